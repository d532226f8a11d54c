"""The launch of training, one process per rank, and an estimate of the memory it takes.

May import every room of the stage."""
