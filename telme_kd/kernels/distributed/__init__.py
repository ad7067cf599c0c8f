"""Losses of one batch that lies on several processes: each works on its part, sums are shared.

All communication happens in the forward pass, over plain collectives; the backward pass is local.
"""
