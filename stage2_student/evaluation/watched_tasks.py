"""Tasks that a student is asked while it is trained: the accuracy of so many questions, every so many steps."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from pipeline.config import WatchedTasksConfig
from pipeline.runtime import log
from pipeline.runtime.format import count_of
from pipeline.runtime.harness_figures import task_figures
from pipeline.runtime.huggingface import without_own_sampling

PREFIX = "task/"  # of a figure in metrics.jsonl, before the task's name


class WatchedTasks:
    """The questions, loaded once, and the student as the harness sees it.

    Args:
        tokenizer: transformers' own, of the student's folder; it is the harness' alone from then on.
    Raises:
        ValueError: the harness is not installed, a task is unknown, or its data is unavailable.
    """

    def __init__(self, config: WatchedTasksConfig, tokenizer: Any) -> None:
        if find_spec("lm_eval") is None:
            raise ValueError("train.tasks needs the package lm_eval: install the extra `eval`, or remove train.tasks")
        from stage2_student.evaluation import lm_eval_tasks  # seconds to import

        self.config, self._tokenizer, self._harness = config, tokenizer, lm_eval_tasks
        self._loaded = lm_eval_tasks.load_group(config)
        self._model: Any = None

    def figures(self, student: Any, step: int) -> dict[str, float]:
        """Return each task's figure as `metrics.jsonl` names it, and show it in the log.

        Nothing of the training is changed, its random numbers included.

        Args:
            student: a `stage2_student.model.student.Student` with whole weights.
        """
        with _as_it_was(student), without_own_sampling(student.lm):
            if self._model is None:
                dtype = student.precision.dtype
                mixed = {} if dtype == torch.float32 else {"mixed_precision_dtype": dtype}
                self._model = self._harness.TextModel(student.lm, tokenizer=self._tokenizer, **mixed)
            results = self._harness.run_group(self._model, self.config, *self._loaded)
        found = task_figures({"train": results}, self.config.metrics)
        for name, figure in found.items():
            error = "" if figure.stderr is None else f" \u00b1 {figure.stderr:.4f}"
            asked = count_of(figure.num_questions, "question", ",")
            log.info(f"step {step}, task {name}: {figure.metric} {figure.value:.4f}{error}, of {asked}")
        return {f"{PREFIX}{name}": figure.value for name, figure in found.items()}


@contextmanager
def _as_it_was(student: Any) -> Iterator[None]:
    """Put the student in evaluation mode, and it and all random numbers back: the harness seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    student.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        student.train()
