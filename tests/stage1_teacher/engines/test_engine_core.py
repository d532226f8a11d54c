"""Calls that wait for vLLM's engine core end if its process is killed, by the code of vLLM's own client."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import pytest

from stage1_teacher.engines.engine_core import describe_kill, end_waits_with


def client_of(process: BaseProcess, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return vLLM's client with that process as its core, and without a connection to it."""
    from vllm.v1.engine.core_client import SyncMPClient

    client: Any = SyncMPClient.__new__(SyncMPClient)
    manager = SimpleNamespace(processes=[process])
    client.resources = SimpleNamespace(engine_manager=manager, engine_dead=False)
    client.outputs_queue, client.utility_results = queue.Queue(), {}
    monkeypatch.setattr(SyncMPClient, "_send_input", lambda *_: None)
    return client


def test_calls_that_wait_for_a_core_that_is_killed_fail_and_say_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    client = client_of(process, monkeypatch)
    end_waits_with(client)
    assert describe_kill(client) is None
    raised: queue.Queue[Exception] = queue.Queue()

    def call(method: Callable[..., Any], *arguments: str) -> None:
        try:
            method(*arguments)
        except Exception as error:
            raised.put(error)

    for waiting in ((client.get_output,), (client.call_utility, "collective_rpc")):
        threading.Thread(target=call, args=waiting, daemon=True).start()
    while not client.utility_results:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert all(isinstance(raised.get(timeout=60), RuntimeError) for _ in range(2))
    assert describe_kill(client) == f"vLLM's engine core (process {process.pid}) was killed by SIGKILL"


def test_a_core_in_this_process_is_left_alone() -> None:
    core = SimpleNamespace()
    end_waits_with(core)
    assert describe_kill(core) is None
