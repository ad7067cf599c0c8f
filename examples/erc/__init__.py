"""What the pipelines of both corpora share."""
