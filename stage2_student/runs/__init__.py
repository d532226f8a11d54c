"""A run's folder: whose it is, its checkpoints, its log, its export.

May import the rooms above it: `data` to `evaluation`."""
