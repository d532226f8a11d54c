"""What tests of both stages ask for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.object_store import ObjectStore, object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """A bucket of the module's own, and the environment by which it is reached."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that no test may change."""
    from tests.support.tiny import tiny_model  # with torch and transformers, which many tests do without

    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")
