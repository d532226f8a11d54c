"""A run's folder: its identity, checkpoints, log and export.

May import the folders of the stage from `data` to `evaluation`."""
