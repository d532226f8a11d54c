"""What runs the teacher: vLLM, transformers, a server; each gives hidden states or its own log-probabilities, and is
checked at its start.

May import `inputs`, `reduction`, `pipeline`'s ground and `schemas`; never `coordination` or `ray`.
"""
