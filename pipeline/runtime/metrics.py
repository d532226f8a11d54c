"""Figures of a running command for Prometheus: always counted, served at the address of `--metrics` (or BLD_METRICS).

Rates, such as bytes of text a second, are left to Prometheus: `rate(bld_text_bytes_total[5m])`. The missing mass of a
dump is `rate(bld_missing_mass_total[5m]) / ignoring(kind) group_left rate(bld_positions_total[5m])`, by kind.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from pipeline.runtime import log

VARIABLE = "BLD_METRICS"
LOOPBACK = "127.0.0.1"


class Figures:
    """All figures of this process, in a separate registry: vLLM puts its figures into the package's default one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.planned_bytes = self._gauge("planned_text_bytes", "Bytes of text that this command set out to dump.")
        self.documents = self._counter("documents", "Documents dumped, those left out included.")
        self.text_bytes = self._counter("text_bytes", "Supervised bytes of text dumped.")
        self.tokens = self._counter("teacher_tokens", "Teacher tokens of what was dumped.")
        self.stored_bytes = self._counter("stored_bytes", "Bytes of the shards that were committed.")
        self.positions = self._counter("positions", "Positions dumped.")
        self.missing = self._counter(
            "missing_mass",
            "Probability summed over positions: `dropped` on branches that were not expanded, "
            "`tail` on symbols that were not stored.",
            "kind",
        )
        self.failures = self._counter(
            "failures",
            "What went wrong and was dealt with: `engine` restarted, `request` asked again, `document` left out, "
            "`writer` of shards replaced, `overflow` of a gradient.",
            "kind",
        )
        self.step = self._gauge("train_step", "Optimizer steps taken.")
        self.train = self._gauge("train", "The last step's figures, by their names in metrics.jsonl.", "figure")
        for kind in ("dropped", "tail"):
            self.missing.labels(kind)
        for kind in ("engine", "request", "document", "writer", "overflow"):
            self.failures.labels(kind)  # 0 from the start: an alert on the first one needs it

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"bld_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"bld_{name}", meaning, labels, registry=self.registry)


@cache
def figures() -> Figures:
    """Return this process's figures, made when they are first asked for."""
    return Figures()


def count_failure(kind: str) -> None:
    """Count something that went wrong and was dealt with, of one of the kinds of `Figures.failures`."""
    figures().failures.labels(kind).inc()


def set_train(step: int, values: Mapping[str, float]) -> None:
    """Set the figures of the last step, by name."""
    figures().step.set(step)
    for name, value in values.items():
        figures().train.labels(name).set(value)


def parse_address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`, or `PORT` for this machine only. Raises ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--metrics ({VARIABLE}) is {text!r}: give PORT or HOST:PORT, as in 9400 or 0.0.0.0:9400")
    return host.strip("[]") or LOOPBACK, int(port)


@contextmanager
def served() -> Iterator[str | None]:
    """Serve the figures at `http://HOST:PORT/metrics` within the context.

    Yields that address, or None if `--metrics` is not given. Raises OSError if the port is taken.
    """
    requested = os.environ.get(VARIABLE)
    if not requested:
        yield None
        return
    host, port = parse_address(requested)
    try:
        server, thread = start_http_server(port, host, figures().registry)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise OSError(
            f"--metrics ({VARIABLE}) is {requested}: nothing can be served there ({error.strerror}); give another port "
            "or host"
        ) from error
    try:
        address = f"http://{host}:{server.server_port}/metrics"
        log.info(f"metrics are served at {address}")
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
