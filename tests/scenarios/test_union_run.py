"""A run on a union: two teachers of one corpus mixed, and a third of another, with held-out text of both."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import CorpusConfig, EvalConfig, Recipe, TeacherConfig
from pipeline.config.loading import save_recipe
from pipeline.planning.dry_run import plan
from pipeline.reports.page import page, plots_of
from pipeline.reports.runs import read_run
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.manifest import read_json
from stage2_student.data.batch_plan import Share, plan_union
from stage2_student.data.union import open_members
from stage2_student.runs.retention import evaluation_of
from stage2_student.training.usable import counted_lines
from tests.support.micro_batches import count_all
from tests.support.small_dumps import make_dump, make_recipe, make_text
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
TIMES = {"tokens_per_second", "data_wait_share", "memory_bytes", "seconds"}


def recipe(work: Path, name: str) -> Recipe:
    dumps = [
        {"path": str(work / "prose"), "corpus": "prose", "weight": 2.0},
        {"path": str(work / "prose2"), "corpus": "prose"},
        {"path": str(work / "verse"), "corpus": "verse"},
    ]
    values = {"objectives": {"ce": 1.0, "byte_ce": 1.0, "kl": 0.1}}
    found = make_recipe(work / "prose", work / "model", work / name, values, dumps=dumps)
    held_out = {"source": str(work / "held.jsonl"), "corpora": {"verse": {"source": str(work / "verse.jsonl")}}}
    train = found.train.model_copy(update={"eval_every": 3})
    return found.with_values(eval=EvalConfig.model_validate(held_out), train=train)


def start(work: Path, name: str) -> "subprocess.Popen[bytes]":
    save_recipe(recipe(work, name), work / f"{name}.yaml")
    command = [sys.executable, "-m", "stage2_student.training.train", "--recipe", str(work / f"{name}.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=work)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    for name, seed, records in (("prose", 1, 48), ("prose2", 1, 48), ("verse", 2, 6)):
        make_dump(work / name, records, 3, seed=seed, teacher=name)
    for name, seed in (("held", 7), ("verse", 8)):
        texts = [make_text(np.random.default_rng(seed + i), 9).decode() for i in range(4)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert start(work, "whole").wait(600) == 0
    return work


def test_each_step_has_the_shares_and_the_figures_of_each_corpus(work: Path) -> None:
    lines, run = metrics(work / "whole"), work / "whole"
    wanted = recipe(work, "whole")
    assert wanted.student is not None
    members = open_members(wanted.student.dumps_by_corpus, "arithmetic", 0)
    tokenizer = ByteTokenizer.load(str(work / "model"))
    lengths = [count_all(member.reader, tokenizer, 512, with_bytes=True) for member in members]
    shares = [Share(of, member.weight, member.name) for of, member in zip(lengths, members, strict=True)]
    before = (0, 0)
    for line, batch in zip(lines, islice(plan_union(shares, 0, 120, 512), 6), strict=True):
        drawn: Any = batch.after
        of_step = [after - until for after, until in zip(drawn.num_bytes, before, strict=True)]
        before = drawn.num_bytes
        assert line["supervised_bytes"] == sum(before)
        for name, num_bytes in zip(("prose", "verse"), of_step, strict=True):
            assert math.isclose(line[f"bytes_share/{name}"], num_bytes / sum(of_step))
        for key in ("loss", "ce", "kl", "bits_per_byte"):
            mean = sum(line[f"bytes_share/{name}"] * line.get(f"{key}/{name}", 0.0) for name in ("prose", "verse"))
            assert math.isclose(line[key], mean, rel_tol=1e-5)
    assert abs(before[0] / sum(before) - 0.75) < 0.05
    assert lines[-1]["epoch/verse"] >= 1 and lines[-1]["epoch/prose"] == lines[-1]["epoch"] == 0
    measured = [line for line in lines if "eval_bits_per_byte" in line]
    assert [line["step"] for line in measured] == [2, 3, 4, 6]
    for line in measured:
        texts = [line[f"eval_bits_per_byte/{name}"] for name in ("held_out", "verse")]
        assert math.isclose(line["eval_bits_per_byte"], sum(texts) / 2) and texts[0] != texts[1]
    evaluation = evaluation_of(run, 6)
    assert (
        evaluation is not None and evaluation.by_text is not None and set(evaluation.by_text) == {"held_out", "verse"}
    )
    assert set(read_json(run / "identity.json")["corpora"]) == {"prose", "verse"}


def test_the_plan_and_the_report_of_a_union_name_its_corpora(work: Path) -> None:
    corpus, teacher = CorpusConfig(source=str(work / "held.jsonl")), TeacherConfig(model=str(work / "model"))
    shown = dict(plan(recipe(work, "whole").with_values(corpus=corpus, teacher=teacher)))
    assert shown["student"].endswith("from 2 corpora")
    assert shown["student.dumps, verse"].startswith("25.0% of the supervised bytes of every step, from ")
    assert "arithmetic mean" in shown["student.dumps, prose"]
    counted = [text for _, text in counted_lines(recipe(work, "whole"))]
    [verse] = [line for line in counted if line.startswith("verse: 25.0% of the supervised bytes of every step; ")]
    times = float(verse.split(" read ")[1].split()[0])
    assert abs(times - metrics(work / "whole")[-1]["epoch/verse"]) <= 1
    run = read_run(work / "whole")
    assert {"loss/verse", "eval_bits_per_byte/held_out"} <= {plot.key for plot in plots_of([run])}
    html = page([run], ["whole"])
    assert "<h2>Corpora</h2>" in html and '<td>verse</td><td class="n">25.0%</td>' in html


def test_a_run_on_a_union_that_is_killed_ends_with_the_same_bits(work: Path) -> None:
    run = work / "killed"
    process = start(work, "killed")
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(work, "killed").wait(600) == 0
    assert metrics(run) == metrics(work / "whole")
    ours, theirs = (load_file(work / name / "export" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
