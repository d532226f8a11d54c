"""Planning before any work is done: the dry run of a recipe, and the forecast of its cost from a sample.

May import all other ground rooms."""
