"""Trackers of metrics beside metrics.jsonl: TensorBoard and Prometheus always, Weights & Biases if the recipe asks."""

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
    """A receiver of each step's figures, under their names in metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. Figures that an interrupted run wrote after `first_step` are not shown."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Prometheus:
    """The last step's figures, served by this process (`--metrics`)."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        set_train(step, values)

    def close(self) -> None:
        """Leave the last figures as they are."""


class Wandb:
    """A run at Weights & Biases, the same one after a resume: its id is stored in the run's folder.

    The service drops data whose step is older than the newest it knows, which happens after a resume. Our step is
    therefore logged as a value like any other, and used as the x axis.
    """

    def __init__(self, run: Path, config: WandbConfig, recipe: Recipe) -> None:
        check_installed(config)
        wandb = importlib.import_module("wandb")
        sections = recipe.model_dump(mode="json", include={"dump", "student", "train"})
        name = config.name or "/".join(run.resolve().parts[-2:])
        self._run: Any = wandb.init(
            project=config.project,
            name=name,
            mode=config.mode,
            id=_run_id(run),
            resume="allow",
            dir=str(run),
            config=sections,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _run_id(run: Path) -> str:
    """Return the run's id, drawn once per folder."""
    path = run / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def check_installed(config: WandbConfig | None) -> None:
    """Raise ValueError if the recipe asks for Weights & Biases and the package is not installed."""
    if config is not None and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb (project {config.project}) needs the package wandb, which is not installed: "
            f"{sys.executable} -m pip install wandb, or remove train.wandb"
        )


def open_trackers(recipe: Recipe, first_step: int) -> list[Tracker]:
    """Open the trackers that a recipe's metrics go to."""
    run, config = Path(student_config(recipe).path), recipe.train.wandb
    trackers: list[Tracker] = [TensorBoard(run, first_step), Prometheus()]
    return trackers if config is None else [*trackers, Wandb(run, config, recipe)]
