"""vLLM's own processes end with the process that started them."""

import os

import pytest

from stage1_teacher.engines import vllm


@pytest.mark.parametrize(("num_workers", "core", "watched"), [(1, "0", 0), (1, "1", 1), (2, "0", 1)])
def test_an_engine_that_starts_processes_is_watched(
    num_workers: int, core: str, watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr(vllm, "end_children_with_me", lambda: asked.append(None))
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": core})
    vllm.prepare_environment(num_workers)
    assert len(asked) == watched
