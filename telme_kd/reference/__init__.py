"""Plain PyTorch that reads like the paper: the definition every fused backend is held to.

Nothing here imports the rest of the package. Inputs arrive checked, flattened to a matrix and in
float32 or float64, with autocast off.
"""
