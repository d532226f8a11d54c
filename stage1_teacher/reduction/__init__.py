"""Reduction of hidden states to sums over column ranges: the head, the rule of its logits, the kernels.

May import `pipeline`'s ground and `schemas`; never `coordination` or `ray`."""
