"""A dump on a Ray cluster of three hosts into an object store, while one host is cut off.

Each host has a network and a name of its own.

    .venv/bin/python -m tests.bench.hosts [--documents 40] [--cut-after 6]

The hosts are network namespaces of this machine, joined by a bridge: loopback does not reach from one to another. The
first runs the store, the cluster's head and `bld teacher --ray`; the others an engine each. After some shards the last
host's cable is pulled, and is not put back. The dump must hold what one that a single process makes holds. Needs root
and iproute2.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import psutil
import typer

from pipeline.runtime.child_processes import end_children_with_me
from schemas.storage.locations import location, names
from stage1_teacher.verification.verify import verify_dump
from tests.scenarios.test_store_dump import stored
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.stage1_teacher.ray.test_pool import ENVIRONMENT
from tests.support.object_store import SERVER, open_bucket
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
SWITCH, PORT = "bld-switch", 6379
HOSTS = ("bld-host-1", "bld-host-2", "bld-host-3")
WAIT_SECONDS = 900.0


def address_of(host: str) -> str:
    return f"10.77.0.{host[-1]}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network() -> Iterator[None]:
    """Create namespaces for the hosts and the switch between them; remove them at the end."""
    made: list[str] = []
    try:
        for name in (SWITCH, *HOSTS):
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for host in HOSTS:
            ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", host, "netns", SWITCH)
            ip("-n", host, "address", "add", f"{address_of(host)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", SWITCH, "link", "set", host, "master", "bridge", "up")
        yield
    finally:
        for name in made:
            ip("netns", "del", name)


def at(host: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs on that host."""
    return ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", *command]


class Processes:
    """Processes on the hosts, each with a log of its own; ended with the context."""

    def __init__(self, logs: Path, stack: ExitStack) -> None:
        self._logs, self._stack = logs, stack

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self._logs / f"{name}.txt").open("wb"))
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log)
        self._stack.callback(_end, process)
        return process

    def said(self, name: str) -> str:
        return (self._logs / f"{name}.txt").read_text(encoding="utf-8")

    def until(self, name: str, done: Callable[[], bool]) -> None:
        """Wait for something from a process; if it takes too long, end the bench with the process's log."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} took more than {WAIT_SECONDS:.0f} s:\n{self.said(name)[-3000:]}")
            time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants: Ray on a host that was cut off does not hear that it is over."""
    children = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.communicate()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        child.kill()


def inside(documents: int, cut_after: int) -> None:
    """Run everything on the first host."""
    with tempfile.TemporaryDirectory(prefix="bld-hosts-") as folder, ExitStack() as stack:
        root, head, last = Path(folder), address_of(HOSTS[0]), HOSTS[-1]
        processes = Processes(root, stack)
        model = tiny_model(root / "model")
        one = dump(write_recipe(root / "one", model, TEXTS[:documents], shard_bytes=100))
        processes.start("store", [sys.executable, "-c", SERVER.replace("127.0.0.1", head)])
        processes.until("store", lambda: processes.said("store").endswith("\n"))
        host, port = processes.said("store").split()
        os.environ |= open_bucket(f"{host}:{port}").environment | ENVIRONMENT
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        for name in HOSTS:
            role = [f"--address={head}:{PORT}", "--num-cpus=1"]
            if name == HOSTS[0]:
                role = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
            sized = [f"--node-ip-address={address_of(name)}", f"--object-store-memory={100 << 20}"]
            processes.start(name, at(name, [*ray, *role, *sized]))
            processes.until(name, lambda name=name: "Ray runtime started" in processes.said(name))  # type: ignore[misc]
            print(f"{name} ({address_of(name)}) has joined", flush=True)
        recipe = write_recipe(root / "three", model, TEXTS[:documents], shard_bytes=100, path="s3://bucket/hosts")
        dumped = location("s3://bucket/hosts")
        command = [sys.executable, "-m", "pipeline", "teacher", str(recipe), "--ray", f"--address={head}:{PORT}"]
        started = time.monotonic()
        driver = processes.start("driver", at(HOSTS[0], [*command, "-o", "placement.engine_cpus=1"]))
        ready = f"of {last}; "
        processes.until(
            "driver",
            lambda: (
                driver.poll() is not None
                or (len(names(dumped / "shards")) >= cut_after and ready in processes.said("driver"))
            ),
        )
        ip("-n", SWITCH, "link", "set", last, "down")
        print(f"{last} is cut off after {len(names(dumped / 'shards'))} shards", flush=True)
        processes.until("driver", lambda: driver.poll() is not None)
        print(processes.said("driver"))
        same, faults = stored(dumped) == content(one), verify_dump(dumped)
        print(
            f"exit code {driver.returncode} after {time.monotonic() - started:.0f} s; equal: {same}; faults: {faults}"
        )
        if driver.returncode or not same or faults:
            raise SystemExit(1)


def main(
    documents: Annotated[int, typer.Option(max=len(TEXTS), help="Of the dump; about one a shard.")] = 40,
    cut_after: Annotated[int, typer.Option(help="Shards after which the last host is cut off.")] = 6,
    inner: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    end_children_with_me()
    if inner:
        inside(documents, cut_after)
        return
    options = ["--documents", str(documents), "--cut-after", str(cut_after), "--inner"]
    with network():
        done = subprocess.run(
            at(HOSTS[0], [sys.executable, "-m", "tests.bench.hosts", *options]), cwd=ROOT, check=False
        )
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    typer.run(main)
