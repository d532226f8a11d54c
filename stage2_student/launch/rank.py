"""Entry point of a rank started by DeepSpeed's launcher: `python rank.py --recipe FILE`.

A file rather than a module (`python -m`), because DeepSpeed puts the current folder first on the path of a hostfile's
ranks, where the operator may have a package with the name of one of ours.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from stage2_student.training.train import main

    main()
