"""Figures of a running command for Prometheus: always counted, served where `--metrics` (or BLD_METRICS) says.

A rate, such as bytes of text a second, is Prometheus' business: `rate(bld_text_bytes_total[5m])`. The missing mass of a dump is
`rate(bld_missing_mass_total[5m]) / ignoring(kind) group_left rate(bld_positions_total[5m])`, by kind.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from pipeline.runtime.log import say

VARIABLE = "BLD_METRICS"
LOOPBACK = "127.0.0.1"

REGISTRY = CollectorRegistry()  # not the package's own, where vLLM puts its figures
PLANNED_BYTES = Gauge("bld_planned_text_bytes", "Bytes of text that this command set out to dump.", registry=REGISTRY)
DOCUMENTS = Counter("bld_documents", "Documents dumped, those left out included.", registry=REGISTRY)
TEXT_BYTES = Counter("bld_text_bytes", "Supervised bytes of text dumped.", registry=REGISTRY)
TOKENS = Counter("bld_teacher_tokens", "Teacher tokens of what was dumped.", registry=REGISTRY)
STORED_BYTES = Counter("bld_stored_bytes", "Bytes of the shards that were committed.", registry=REGISTRY)
POSITIONS = Counter("bld_positions", "Positions dumped.", registry=REGISTRY)
MISSING = Counter(
    "bld_missing_mass",
    "Probability summed over positions: `dropped` on branches that were not expanded, `tail` on symbols that were not stored.",
    ["kind"],
    registry=REGISTRY,
)
FAILURES = Counter(
    "bld_failures",
    "What went wrong and was dealt with: `engine` restarted, `request` asked again, `document` left out, `overflow` of a gradient.",
    ["kind"],
    registry=REGISTRY,
)
STEP = Gauge("bld_train_step", "Optimizer steps taken.", registry=REGISTRY)
TRAIN = Gauge("bld_train", "The last step's figures, by their names in metrics.jsonl.", ["figure"], registry=REGISTRY)

for _kind in ("dropped", "tail"):
    MISSING.labels(_kind)
for _kind in ("engine", "request", "document", "overflow"):
    FAILURES.labels(_kind)  # 0 from the start: a rule that waits for the first one needs it


def set_train(step: int, figures: Mapping[str, float]) -> None:
    STEP.set(step)
    for name, value in figures.items():
        TRAIN.labels(name).set(value)


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, or `PORT` for this machine alone. Raises ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--metrics ({VARIABLE}) is {text!r}: give PORT or HOST:PORT, as in 9400 or 0.0.0.0:9400")
    return host.strip("[]") or LOOPBACK, int(port)


@contextmanager
def served() -> Iterator[str | None]:
    """Serve the figures at `http://HOST:PORT/metrics` while it lasts; yields that address, or None where none is asked for.

    Raises OSError where the port is taken.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        yield None
        return
    host, port = parse_address(asked)
    try:
        server, thread = start_http_server(port, host, REGISTRY)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise OSError(
            f"--metrics ({VARIABLE}) is {asked}: nothing can be served there ({error.strerror}); give another port or host"
        ) from error
    try:
        address = f"http://{host}:{server.server_port}/metrics"
        say(f"metrics are served at {address}")
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
