"""Profile of a dump's time beyond its hidden states, and a teacher's distance from itself."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.dump_task import Task


def profile(task: Task, teacher: Any) -> dict[str, float]:
    """Measure microseconds per token of each step beyond the hidden states, and the reduction's lower bound."""
    import torch

    from pipeline.covering.covering import Covering
    from pipeline.covering.intervals import Intervals
    from schemas.shard import commit_shard, to_table
    from stage1_teacher.inputs.encoded_windows import cut_document
    from stage1_teacher.reduction.reducer import as_rows, even_bounds
    from stage1_teacher.reduction.types import Masses
    from stage1_teacher.targets.records import make_record

    spent: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[name] = spent.get(name, 0.0) + (time.perf_counter() - started) * 1e6 / task.num_tokens

    reducer, vocabulary = teacher.reducer, teacher.vocabulary
    hidden_RD = torch.cat(teacher.engine.hidden_states(task.prompts))
    from pipeline.corpus.documents import Document

    with step("encode"):
        documents = [Document(doc_id="", text=text, messages=None) for text in task.texts]
        windows = [cut_document(document, task.tokenizer, 1024, 128)[0] for document in documents]
    with step("which ranges (covering)"):
        coverings = [Covering(vocabulary, window.tokens, window.text) for window in windows]
        intervals = Intervals.join([covering.canonical for covering in coverings])
    masses = Masses.empty(intervals)
    bounds = even_bounds(len(hidden_RD), reducer.chunk)
    for first, last in pairwise(bounds):
        with step("head"):
            logits_RC = reducer.head.logits(hidden_RD[first:last])
        with step("floor of the reduction: each logit read once"):
            torch.sum(logits_RC)
        with step("softmax and range sums"):
            reducer.kernel(logits_RC, first, intervals, masses)
    hot_RC = torch.linspace(-20, 0, 4 * logits_RC.shape[1]).view(
        4, -1
    )  # stays in cache, and 4 rows keep the threads busy
    exp_RC = torch.empty_like(hot_RC)
    for _ in range(len(hidden_RD) // 4):
        with step("floor of the reduction: one exp a logit, in cache"):
            torch.exp(hot_RC, out=exp_RC)
    rows, first = as_rows(intervals, masses), 0
    records = []
    for window, covering in zip(windows, coverings, strict=True):
        last = first + len(covering.offsets)
        with step("sums into targets"):
            targets = covering.targets(rows[first:last])
        with step("sparsify and record"):
            records.append(make_record(window, [targets], task.tokenizer, 16, 1e-3))
        first = last
    with step("Parquet, zstd"), tempfile.TemporaryDirectory() as folder:
        commit_shard(to_table(records, {}), Path(folder) / "part.parquet", task.recipe.dump.zstd_level)
    spent["ranges per row"] = len(masses.masses_I) / len(hidden_RD)
    return spent


def controls(task: Task, teacher: Any) -> dict[str, dict[str, float]]:
    """Measure the divergence, nats per position, between dense targets of one teacher asked twice."""
    import torch

    first = dense_targets(task, teacher, task.prompts)
    rounded = teacher.reducer.head.logits

    @torch.inference_mode()
    def round_logits(hidden_RD: Any) -> Any:
        logits_RC = rounded(hidden_RD)
        return logits_RC.copy_(logits_RC.bfloat16())

    alone = dense_targets(task, teacher, None)
    teacher.reducer.head.logits = round_logits
    in_bfloat16 = dense_targets(task, teacher, task.prompts)
    del teacher.reducer.head.logits
    return {
        "asked again, each document alone in its batch": divergence(first, alone),
        "logits rounded to bfloat16": divergence(first, in_bfloat16),
    }


def dense_targets(task: Task, teacher: Any, prompts: list[list[int]] | None) -> Any:
    """Return all positions' distributions stacked; `prompts` together, or one by one in reverse order."""
    import numpy as np

    from pipeline.covering.covering import Covering
    from stage1_teacher.reduction.types import Rows

    if prompts is not None:
        hidden = teacher.engine.hidden_states(prompts)
    else:
        hidden = [teacher.engine.hidden_states([prompt])[0] for prompt in reversed(task.prompts)][::-1]
    found = []
    for text, prompt, states_RD in zip(task.texts, task.prompts, hidden, strict=True):
        covering = Covering(teacher.vocabulary, prompt[1:], text)
        [rows] = teacher.reducer.reduce([Rows(covering, covering.offsets, states_RD)])
        found.append(covering.targets(rows).probs_PV)
    return np.concatenate(found)


def divergence(p_PV: Any, q_PV: Any) -> dict[str, float]:
    import numpy as np

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
