"""How the training is started, one process per rank, and the memory that it will take.

May import every room of the stage."""
