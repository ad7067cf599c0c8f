"""Hand-written passes in few PyTorch calls, a block of rows at a time."""
