"""A small synthetic corpus, laid out as the published ones, and tiny encoders for it."""
