"""The paper's tables and figures, for either corpus and from any source."""
