"""What tests of both stages ask for."""

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
    """Put the scenarios first: a file of a few long tests that comes last keeps one worker busy while the others have
    nothing to do.
    """
    items.sort(key=lambda item: "scenarios" not in item.path.parts)


@pytest.fixture(autouse=True)
def environment_of_no_command() -> Iterator[None]:
    """Take back what a command that a test runs in this process has put there: tests after it start processes of their
    own.
    """
    yield
    for name in OF_A_COMMAND:
        if name in AT_START:
            os.environ[name] = AT_START[name]
        else:
            os.environ.pop(name, None)


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
