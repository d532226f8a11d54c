"""The targets of `tests.bench.fuzz`, driven by atheris, which searches for inputs that reach new branches.

    .venv/bin/python -m tests.bench.guided_fuzz shard [-max_total_time=60] [-runs=10000]

Options are libFuzzer's. atheris is no dependency of the project: it is fetched into `runs/guided_fuzz` the first time.
It has wheels for Linux on x86 alone. What it found lies there too, as `crash-*`, and is run again by naming that file.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

FOLDER = Path("runs/guided_fuzz")
VERSION = "atheris==3.0.0"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    fetched = FOLDER / "packages"
    if not fetched.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(fetched), VERSION], check=True)
    sys.path.append(str(fetched))
    import atheris

    with atheris.instrument_imports(include=["pipeline", "schemas"]):
        from tests.support.fuzz import TARGETS, accepted

    target = sys.argv.pop(1)
    if target not in TARGETS:
        raise SystemExit(f"no target {target!r}; there are {', '.join(TARGETS)}")

    class Proposed(Random):
        """Draws from the fuzzer's input; 0 when the input is used up."""

        def __init__(self, proposal: bytes) -> None:
            self.proposal = atheris.FuzzedDataProvider(proposal)
            super().__init__()

        def getrandbits(self, k: int) -> int:
            return int(self.proposal.ConsumeUInt((k + 7) // 8)) >> (-k % 8)

        def random(self) -> float:
            return self.getrandbits(16) / 2**16

    with tempfile.TemporaryDirectory() as folder:

        def one_input(proposal: bytes) -> None:
            accepted(target, Proposed(proposal), Path(folder))

        found = FOLDER / target
        found.mkdir(parents=True, exist_ok=True)
        atheris.Setup([*sys.argv, f"-artifact_prefix={FOLDER}/", str(found)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
