"""What a recipe would take before it takes it: the dry run, and the forecast from a sample.

May import all other ground rooms."""
