"""Tasks for lm-evaluation-harness on data from packages, in the harness' own YAML, for machines without a hub."""
