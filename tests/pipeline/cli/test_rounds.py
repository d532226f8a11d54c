"""`bld round`: each command is a process of its own, which is stopped with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cli import rounds
from pipeline.cli.rounds import run_command
from pipeline.runtime.termination import Terminated, terminable

# Stands for a command: exits with the code that it is given, or sleeps, and notes the signal that ends it.
COMMAND = """
import signal, sys, time

def ended(number, frame):
    open(sys.argv[1], "w").write(str(number))
    sys.exit(128 + number)

signal.signal(signal.SIGINT, ended)
signal.signal(signal.SIGTERM, ended)
if sys.argv[1].isdigit():
    sys.exit(int(sys.argv[1]))
open(sys.argv[1] + ".started", "w").close()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_BLD", (sys.executable, "-c", COMMAND))


def test_a_failed_command_is_named_and_a_stopped_one_stops_the_rounds() -> None:
    run_command(["0"])
    with pytest.raises(ChildProcessError, match=r"`bld 1 recipe.yaml` failed \(exit code 1\) for the reason above"):
        run_command(["1", "recipe.yaml"])
    for code, stopped in ((130, KeyboardInterrupt), (143, Terminated)):
        with pytest.raises(stopped):
            run_command([str(code)])


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path: Path, number: int, raised: type[BaseException]) -> None:
    noted = tmp_path / "signal"

    def send() -> None:
        while not Path(f"{noted}.started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(raised), terminable():
        run_command([str(noted)])
    assert noted.read_text() == str(int(number))


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_amid_the_start_of_a_command_reaches_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, raised: type[BaseException]
) -> None:
    noted = tmp_path / "signal"

    def interrupted(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(*arguments, **options)
        while not Path(f"{noted}.started").exists():
            time.sleep(0.01)
        signal.raise_signal(number)
        return process

    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(Popen=interrupted))
    with pytest.raises(raised), terminable():
        run_command([str(noted)])
    assert noted.read_text() == str(int(number))
