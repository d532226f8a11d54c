"""The operator's side, and what both stages stand on: recipes, sources, corpus, token bytes, covering arithmetic."""
