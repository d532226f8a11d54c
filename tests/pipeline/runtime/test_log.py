"""Messages of commands: one line format, three levels, JSON on demand; the same in child processes."""

import json
import os
import re
import subprocess
import sys

import pytest

from pipeline.runtime import log
from pipeline.runtime.progress import Progress
from tests.pipeline.cli.test_app import ROOT, run_main


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> object:
    for name in (log.LEVEL, log.FORMAT, log.COMMAND, "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")  # so that what the test puts there goes with it
        monkeypatch.delenv(name)
    log.set_level("normal")
    yield
    log.set_level("normal")


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_has_time_command_level_and_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(log.COMMAND, "teacher")
    log.info("x: 4 shards", shards=4)
    log.warning("y")
    log.error("z")
    plain, warning, error = said(capsys)
    assert re.fullmatch(r"\d\d:\d\d:\d\d bld teacher: x: 4 shards", plain)
    assert warning.endswith(" bld teacher: warning: y") and error.endswith(" bld teacher: error: z")


@pytest.mark.parametrize(
    ("level", "shown"),
    [("quiet", ["warning"]), ("normal", ["info", "warning"]), ("verbose", ["debug", "info", "warning"])],
)
def test_each_level_shows_what_it_says(level: log.Level, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    log.set_level(level)
    for speak in (log.debug, log.info, log.warning):
        speak(speak.__name__)
    assert [line.rpartition(" ")[2] for line in said(capsys)] == shown


def test_as_json_every_line_is_an_object_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_format("json")
    log.info("é\n", path=ROOT, number=2)
    with Progress(2, 100) as progress:
        progress.update(documents=2, text_bytes=100, tokens=40, stored_bytes=50)
    message, work = map(json.loads, said(capsys))
    assert message["message"] == "é\n" and message["path"] == str(ROOT) and message["number"] == 2
    assert work["text_bytes"] == 100 and work["stored_bytes"] == 50 and work["level"] == "info"


def test_options_are_taken_before_the_command_and_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--log-json", "inspect", "nowhere"], ["inspect", "nowhere", "--log-json"]):
        monkeypatch.delenv(log.FORMAT, raising=False)
        assert run_main(monkeypatch, *arguments) == 1
        [line] = said(capsys)
        assert json.loads(line)["command"] == "inspect" and json.loads(line)["level"] == "error"
    monkeypatch.delenv(log.FORMAT)
    assert run_main(monkeypatch, "inspect", "nowhere", "-q", "-v") == 1
    assert "do not go together" in said(capsys)[0]


def test_a_process_that_a_command_starts_says_it_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    log.set_level("quiet")
    log.set_format("json")
    script = "from pipeline.runtime import log as logs; logs.info('a'); logs.warning('b', n=1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [json.loads(line)["n"] for line in done.stderr.splitlines()] == [1]
    wrong = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, log.LEVEL: "loud"},
        check=False,
    )
    assert "BLD_LOG_LEVEL is 'loud'; give quiet, normal or verbose" in wrong.stderr


@pytest.mark.parametrize(
    ("variable", "value", "known"),
    [(log.LEVEL, "loud", "quiet, normal or verbose"), (log.FORMAT, "xml", "text or json")],
)
def test_a_variable_with_a_value_that_does_not_exist_is_an_error_in_one_line(
    variable: str, value: str, known: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert run_main(monkeypatch, "inspect", "nowhere") == 1
    [line] = said(capsys)
    assert line.endswith(f"error: {variable} is {value!r}; give {known}, or leave it unset")


def test_to_import_the_log_adds_no_handler_and_reads_no_variable() -> None:
    script = "import logging, pipeline.runtime.log; print(logging.getLogger('bld').handlers)"
    environment = {**os.environ, log.LEVEL: "loud"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout == "[]\n"
