"""The client of a teacher's server: patience, load, and the key."""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import load_recipe
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.engines import http_client
from tests.support.fake_server import FakeServer
from tests.support.served import END_ID, open_engine, served_recipe

KEY = "sk-not-for-the-logs-0123456789"


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

    monkeypatch.setattr(http_client, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    fake.refusals = [(500, {}, ""), (502, {}, ""), (503, {"Retry-After": "9"}, ""), (503, {"Retry-After": "9999"}, "")]
    engine.listed_rows([[END_ID]])
    engine.close()
    assert 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2
    assert waits[2:] == [9.0, http_client.LONGEST_WAIT]


def test_no_more_requests_are_under_way_than_placement_says(fake: FakeServer, tokenizer: ByteTokenizer) -> None:
    engine = open_engine(fake.url, tokenizer, {"requests": 3})
    engine.listed_rows([[END_ID]] * 20)
    engine.close()
    assert fake.max_under_way == 3


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


def test_the_key_reaches_the_server_and_nothing_else(
    fake: FakeServer,
    tmp_path: Path,
    model: Path,
    tokenizer: ByteTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(http_client.KEY_VARIABLE, KEY)
    recipe, overrides = served_recipe(tmp_path, model, fake.url, "placement.request_attempts=2")
    fake.refusals = [(503, {}, f"busy, {KEY}")]
    run_teacher(load_recipe(recipe, overrides))
    assert {headers["Authorization"] for _, headers, _ in fake.requests} == {f"Bearer {KEY}"}
    fake.refusals = [(401, {}, f"Incorrect API key: {KEY}")]
    with pytest.raises(ValueError, match=f"Incorrect API key: .{http_client.KEY_VARIABLE}..*is not accepted") as error:
        open_engine(fake.url, tokenizer)
    captured = capfd.readouterr()
    assert KEY not in f"{error.getrepr(showlocals=False)}{captured.out}{captured.err}"
    assert "busy, [BLD_API_KEY]" in captured.err
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4 and not [text for text in written if KEY.encode() in text]


def test_a_key_that_no_header_can_hold_is_refused_unseen(
    fake: FakeServer, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(http_client.KEY_VARIABLE, "secret\nkey")
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
