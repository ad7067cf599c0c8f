"""The full TelME pipelines, from raw corpora to scores."""
