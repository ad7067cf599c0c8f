"""The templates of pages that need no file beside them."""

import base64
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def templates(
    escaped: Callable[[object], Markup] | None = None, *, beside: Path | None = None
) -> Environment:
    """The templates of this folder.

    Args:
        escaped: Escapes what is filled in; ``None``: as HTML.
        beside: Another folder, whose templates come first.

    Returns:
        An environment with the filter ``data``, which turns a PNG into an address that holds it.
    """
    environment = Environment(
        loader=FileSystemLoader([*([beside] if beside else []), Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data"] = _data
    return environment


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
