"""Where metrics go beside metrics.jsonl: TensorBoard and Prometheus always, Weights & Biases where the recipe asks for
it.
"""

import importlib
import importlib.util
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from pipeline.config import Recipe, WandbConfig, student_config
from pipeline.runtime.metrics import set_train


class Tracker(Protocol):
    """Takes a step's figures, by the names that they have in metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. What a run that was cut off wrote after `first_step` is not shown."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Prometheus:
    """The last step's figures, for who asks this process (`--metrics`)."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        set_train(step, values)

    def close(self) -> None:
        """They stay what they are."""


class Wandb:
    """A run at Weights & Biases, the same one after a resume: its id stands in the run's folder.

    The service drops what has an older step of its own than the newest it knows, as a resume has. Ours is therefore a
    value like others, and the one that curves are drawn over.
    """

    def __init__(self, run: Path, config: WandbConfig, recipe: Recipe) -> None:
        check_installed(config)
        wandb = importlib.import_module("wandb")
        told = recipe.model_dump(mode="json", include={"dump", "student", "train"})
        name = config.name or "/".join(run.resolve().parts[-2:])
        self._run: Any = wandb.init(
            project=config.project,
            name=name,
            mode=config.mode,
            id=_run_id(run),
            resume="allow",
            dir=str(run),
            config=told,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _run_id(run: Path) -> str:
    """Drawn once for a run's folder."""
    path = run / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def check_installed(config: WandbConfig | None) -> None:
    """Raise ValueError where the recipe asks for Weights & Biases and the package is not there."""
    if config is not None and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb (project {config.project}) needs the package wandb, which is not installed: "
            f"{sys.executable} -m pip install wandb, or leave train.wandb out"
        )


def open_trackers(recipe: Recipe, first_step: int) -> list[Tracker]:
    """What a recipe wants its metrics written to."""
    run, config = Path(student_config(recipe).path), recipe.train.wandb
    trackers: list[Tracker] = [TensorBoard(run, first_step), Prometheus()]
    return trackers if config is None else [*trackers, Wandb(run, config, recipe)]
