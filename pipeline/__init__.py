"""Command line and the code that both stages share: recipes, sources, corpus, token bytes, covering arithmetic."""
