"""A rank, as DeepSpeed's launcher starts it: `python rank.py --recipe FILE`.

A file and not a module (`python -m`), because DeepSpeed puts the current folder in front of the path of a hostfile's
ranks, and there the operator may have a package named as one of ours.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from stage2_student.training.train import main

    main()
