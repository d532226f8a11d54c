"""Engines that run the teacher: vLLM, transformers, a server.

Each gives hidden states or its own log-probabilities, and is checked when it starts.

May import `inputs`, `reduction`, `schemas`, and the parts of `pipeline` that both stages share; never `coordination` or
`ray`.
"""
