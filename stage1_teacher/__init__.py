"""Stage 1: serve a teacher once and dump its sparse next-byte distributions."""
