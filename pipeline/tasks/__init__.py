"""Tasks for lm-evaluation-harness on data that packages carry: YAML in its own format, for machines that reach no
hub.
"""
