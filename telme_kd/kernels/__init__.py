"""Fused forward and backward passes, one module per operator, one folder per backend.

A module here makes its operator differentiable and known to ``torch.compile``; the folders below it
hold the arithmetic. What they compute is defined in :mod:`telme_kd.reference`.
"""
