"""Fixtures for tests of both stages."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.object_store import ObjectStore, object_store

# What a command puts into its own environment, for all that it starts.
OF_A_COMMAND = (
    "PYTHONSAFEPATH",
    "TQDM_DISABLE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "VLLM_LOGGING_LEVEL",
    "TORCH_CPP_LOG_LEVEL",
    "BLD_COMMAND",
)
AT_START = dict(os.environ)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the scenarios first.

    A file of a few long tests at the end keeps one worker busy while the others have nothing to do.
    """
    items.sort(key=lambda item: "scenarios" not in item.path.parts)


@pytest.fixture(autouse=True)
def environment_of_no_command() -> Iterator[None]:
    """Undo what a command run in this process has set up.

    Later tests start processes of their own.
    """
    yield
    for name in OF_A_COMMAND:
        if name in AT_START:
            os.environ[name] = AT_START[name]
        else:
            os.environ.pop(name, None)


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """Make a bucket for the module; return the environment variables for reaching it."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model that no test may change."""
    from tests.support.tiny import tiny_model  # with torch and transformers, which many tests do without

    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")
