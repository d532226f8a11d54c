"""Stored targets of a document: dense targets from the reduced rows, made sparse and rounded.

May import `inputs`, `engines`, `reduction`, `schemas`, and the parts of `pipeline` that both stages share; never
`coordination` or `ray`.
"""
