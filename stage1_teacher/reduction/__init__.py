"""Reduction of hidden states to sums over column ranges: the head, the rule of its logits, the kernels.

May import `schemas`, and the parts of `pipeline` that both stages share; never `coordination` or `ray`.
"""
