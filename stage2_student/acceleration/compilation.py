"""torch.compile of the student's trunk: its blocks, between the tokens and the last hidden states."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.config import TrainConfig

# A batch of one row, packed rows, evaluation and a kind of layer each take a graph of their own. Beyond the limit, 8 by
# default, torch goes on without compiling.
_MAX_GRAPHS = 64


def check_compile(train: TrainConfig) -> None:
    """Raise ValueError if this machine lacks the compiler that torch calls for `train.compile`."""
    if not train.compile:
        return
    named = os.environ.get("CXX")
    if shutil.which(named or "g++") is None and shutil.which("clang++") is None:
        raise ValueError(
            "train.compile: true needs a C++ compiler, and there is no "
            + (f"{named}, which CXX names" if named else "g++ or clang++ on the PATH")
            + ": install one (apt-get install g++), name it in CXX, or set train.compile=false"
        )


def compile_trunk(lm: Any, train: TrainConfig) -> None:
    """Have a model's trunk compiled when it is first called, for any number of rows and tokens.

    Names and weights stay as they are. The head and the losses, which work on chunks of varying size, are not compiled.
    """
    if train.compile:
        import torch  # here, because the launcher checks options without it

        torch._dynamo.config.recompile_limit = _MAX_GRAPHS
        lm.base_model.compile(dynamic=True)


@contextmanager
def without_compiling() -> Iterator[None]:
    """Compute as if nothing was compiled: a text that grows by a token at a time would take a graph for each length."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield
