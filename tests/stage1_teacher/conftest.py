"""A teacher, its dump and its server, for most tests of this stage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines import http_client
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe
from tests.support.fake_server import FakeServer


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return a complete dump that no test may change."""
    return dump(write_recipe(tmp_path_factory.mktemp("whole"), model, TEXTS[:12]))


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    """Return a copy of the dump that the test may change."""
    shutil.copytree(whole, tmp_path / "dump")
    return tmp_path / "dump"


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(model))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """Start a server that is retried at once and needs no key."""
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.01)
    monkeypatch.delenv(http_client.KEY_VARIABLE, raising=False)
    server = FakeServer()
    yield server
    server.close()
