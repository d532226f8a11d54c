"""The training run, from its first batch to its last step.

May import every folder of the stage except `launch`."""
