"""The training run, from its first batch to its last step.

May import every room of the stage but `launch`."""
