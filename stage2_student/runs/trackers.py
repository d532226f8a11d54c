"""Trackers of metrics beside metrics.jsonl: TensorBoard and Prometheus always, others if the recipe asks for them."""

import importlib
import importlib.util
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from pipeline.config import MlflowConfig, Recipe, TrainConfig, WandbConfig, student_config
from pipeline.runtime.metrics import set_train

MLFLOW_ID = "mlflow_id"  # in the run's folder
_MLFLOW_REFUSED = re.compile(r"[^\w\-. /]", re.ASCII)  # in names
_MLFLOW_BATCH, _MLFLOW_CHARACTERS = 100, 250  # parameters in a request, and of a value, that every server takes


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


class Mlflow:
    """A run at MLflow, the same one after a resume: its id is stored in the run's folder.

    A step that is taken again after a resume is logged again, with the same figures.
    """

    def __init__(self, run: Path, config: MlflowConfig, recipe: Recipe) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        if config.tracking_uri is not None:
            self._mlflow.set_tracking_uri(config.tracking_uri)
        self._mlflow.set_experiment(config.experiment)
        stored = run / MLFLOW_ID
        begun = stored.read_text(encoding="utf-8") if stored.exists() else None
        name = config.name or "/".join(run.resolve().parts[-2:])
        self._id = str(self._mlflow.start_run(run_id=begun, run_name=name).info.run_id)
        if begun is None:
            stored.write_text(self._id, encoding="utf-8")
            values = list(_flat(recipe.model_dump(mode="json", include={"dump", "student", "train"})))
            for first in range(0, len(values), _MLFLOW_BATCH):
                self._mlflow.log_params(dict(values[first : first + _MLFLOW_BATCH]), run_id=self._id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        figures = {_MLFLOW_REFUSED.sub("_", name): value for name, value in values.items()}
        self._mlflow.log_metrics(figures, step=step, run_id=self._id)

    def close(self) -> None:
        self._mlflow.end_run()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested sections by dotted names, as MLflow has parameters."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _MLFLOW_REFUSED.sub("_", prefix + name), str(value)[:_MLFLOW_CHARACTERS]


def check_installed(train: TrainConfig) -> None:
    """Raise ValueError if the recipe asks for a tracker whose package is not installed."""
    for key, package, config in (
        ("wandb", "wandb", train.wandb),
        ("mlflow", "mlflow-skinny", train.mlflow),
    ):
        if config is not None and key not in sys.modules and importlib.util.find_spec(key) is None:
            raise ValueError(
                f"train.{key} needs the package {key}, which is not installed: "
                f"{sys.executable} -m pip install {package}, or remove train.{key}"
            )


def open_trackers(recipe: Recipe, first_step: int) -> list[Tracker]:
    """Open the trackers that a recipe's metrics go to."""
    run, train = Path(student_config(recipe).path), recipe.train
    check_installed(train)
    trackers: list[Tracker] = [TensorBoard(run, first_step), Prometheus()]
    if train.wandb is not None:
        trackers.append(Wandb(run, train.wandb, recipe))
    if train.mlflow is not None:
        trackers.append(Mlflow(run, train.mlflow, recipe))
    return trackers
