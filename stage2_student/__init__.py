"""Stage 2: train a student from a dump, with no teacher in memory."""
