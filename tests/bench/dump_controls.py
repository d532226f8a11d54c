"""A teacher's distance from itself: all positions' dense targets, from two runs."""

import tempfile
from pathlib import Path
from typing import Any

from tests.bench.dump_task import Task


def dense_targets(task: Task, teacher: Any) -> str:
    """Compute all positions' distributions, P x 256, in the dump's batches; returns the file that holds them."""
    return _save(_targets(task, teacher, [task.prompts]))


def dense_alone(task: Task, teacher: Any) -> str:
    """Compute them with each document alone in its batch, the last one first."""
    return _save(_targets(task, teacher, [[prompt] for prompt in reversed(task.prompts)]))


def _targets(task: Task, teacher: Any, batches: list[list[list[int]]]) -> Any:
    import numpy as np

    from pipeline.covering.covering import Covering
    from stage1_teacher.reduction.types import RowsAlong

    text_of = {tuple(prompt): text for prompt, text in zip(task.prompts, task.texts, strict=True)}
    found = {}
    for batch in batches:
        coverings = [Covering(teacher.vocabulary, prompt[1:], text_of[tuple(prompt)]) for prompt in batch]
        rows = teacher.engine.reduced_rows(batch, [[RowsAlong.canonical(covering, 0)] for covering in coverings])
        for prompt, covering, [of_prompt] in zip(batch, coverings, rows, strict=True):
            found[tuple(prompt)] = covering.targets(of_prompt).probs_PV
    return np.concatenate([found[tuple(prompt)] for prompt in task.prompts])


def _save(probs_PV: Any) -> str:
    import numpy as np

    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, probs_PV)
    return file.name


def divergence(one: str, other: str) -> dict[str, float]:
    """Return the divergences between two files of distributions, nats per position, and remove the second file."""
    import numpy as np

    p_PV, q_PV = np.load(one), np.load(other)
    Path(other).unlink()

    def kl(p: Any, q: Any) -> Any:
        return np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0.0).sum(axis=1)

    middle_PV = (p_PV + q_PV) / 2
    kl_P = kl(p_PV, q_PV)
    return {
        "KL": float(kl_P.mean()),
        "JSD": float((kl(p_PV, middle_PV) + kl(q_PV, middle_PV)).mean() / 2),
        "KL, 99th percentile": float(np.quantile(kl_P, 0.99)),
        "largest KL": float(kl_P.max()),
    }
