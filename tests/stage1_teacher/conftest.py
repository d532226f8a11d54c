"""A teacher, its dump and its server, as most tests of this stage want them."""

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
    """A complete dump that no test may change."""
    return dump(write_recipe(tmp_path_factory.mktemp("whole"), model, TEXTS[:12]))


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    """One that it may."""
    shutil.copytree(whole, tmp_path / "dump")
    return tmp_path / "dump"


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(model))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server that is asked again at once, and wants no key."""
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.01)
    monkeypatch.delenv(http_client.KEY_VARIABLE, raising=False)
    server = FakeServer()
    yield server
    server.close()
