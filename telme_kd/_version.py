"""The version, written here and nowhere else; a literal, so that a build never imports torch."""

__version__ = "0.1.0"
