"""Stage 2: train a student from a dump, with no teacher in memory."""

from pathlib import Path

from stage2_student.our_packages import import_ours

import_ours(Path(__file__).resolve().parents[1])
