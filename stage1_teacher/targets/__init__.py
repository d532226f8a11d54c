"""Stored targets of a document: dense targets from the reduced rows, made sparse and rounded.

May import `inputs`, `engines`, `reduction`, `pipeline`'s ground and `schemas`; never `coordination` or `ray`."""
