"""Changes allowed when a run continues: the schedule of the steps to come."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.loading import parse_recipe, save_recipe
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.data.batch_plan import repeated
from stage2_student.data.order import Position
from stage2_student.data.reader import DumpReader
from stage2_student.runs import folder
from stage2_student.runs.export import is_due
from stage2_student.runs.identity import run_identity
from stage2_student.runs.schedule import continued
from tests.stage2_student.training.test_train import TIMES
from tests.support.micro_batches import global_batches
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[3]
TRAIN_EACH = """
import shutil, sys
from pipeline.config.loading import load_recipe
from stage2_student.runs.export import export
from stage2_student.training.train import train

for name in sys.argv[1:]:
    if name == "more":
        shutil.copytree("whole", "more")
    train(load_recipe(name + ".yaml"))
    if name == "short":  # someone looks at the run on its way
        export("on", step=2)
"""
YAML = "corpus: {source: c}\nteacher: {model: m}\ndump: {path: d}\nstudent: {model: m, path: p}\ntrain: {%s}\n"


def schedule(text: str, begun: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    recipe, remarks = continued(parse_recipe(YAML % text, "r"), begun)
    return {key: getattr(recipe.train, key) for key in ("steps", "warmup_steps", "min_lr_ratio")}, remarks


def test_the_default_warm_up_is_at_most_half_of_the_steps_and_says_so() -> None:
    assert schedule("", {})[0]["warmup_steps"] == schedule("steps: 20", {})[0]["warmup_steps"] == 10
    assert schedule("steps: 20", {})[1] == []
    found, remarks = schedule("steps: 5", {})
    assert found["warmup_steps"] == 2 and remarks == ["train.warmup_steps is 2, half of the 5 steps; the default is 10"]
    assert schedule("steps: 1", {})[0]["warmup_steps"] == 0


def test_a_warm_up_longer_than_all_steps_is_refused_but_where_the_run_began_with_it() -> None:
    with pytest.raises(
        ValueError, match=r"train\.warmup_steps is 1000, and train\.steps 3: .* train\.warmup_steps=1 or less"
    ):
        schedule("steps: 3, warmup_steps: 1000", {})
    begun = {"steps": 5, "warmup_steps": 10, "min_lr_ratio": 0.1}  # as earlier releases let it
    assert schedule("steps: 5, warmup_steps: 10", begun) == (begun, [])
    found, remarks = schedule("steps: 5", begun)
    assert found == begun and remarks == ["train.warmup_steps is 10, as the run began"]


def test_what_the_recipe_does_not_say_stays_as_the_run_began() -> None:
    begun = {"steps": 40, "warmup_steps": 7, "min_lr_ratio": 0.0}
    assert schedule("steps: 80", begun)[0] == begun | {"steps": 80}
    assert schedule("", begun)[0] == begun
    assert schedule("steps: 80, warmup_steps: 9, min_lr_ratio: 0.5", begun)[0] == {
        "steps": 80,
        "warmup_steps": 9,
        "min_lr_ratio": 0.5,
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of 4 steps continued to 6, and one of 6.

    Their rate does not fall, so that their schedules agree.
    """
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    make_dump(work / "dump")
    (work / "each.py").write_text(TRAIN_EACH)
    for file, name, steps in [("short", "on", 4), ("on", "on", 6), ("whole", "whole", 6)]:
        train = {"steps": steps, "min_lr_ratio": 1.0, "warmup_steps": 2, "ema": 0.5}
        save_recipe(make_recipe(work / "dump", work / "model", work / name, train), work / f"{file}.yaml")
    make_dump(work / "extended", num_records=36)
    more = {"steps": 9, "min_lr_ratio": 1.0, "warmup_steps": 2, "ema": 0.5, "change": ["dump", "objectives"]}
    more["objectives"] = {"ce": 1.0, "byte_ce": 1.0, "kl": 2.0, "alm": 0.0}
    save_recipe(make_recipe(work / "extended", work / "model", work / "more", more), work / "more.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "each.py", "short", "on", "on", "whole", "more"]
    said = subprocess.run(command, env=environment, cwd=work, check=True, capture_output=True, text=True)
    (work / "said").write_text(said.stdout + said.stderr)
    return work


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_run_that_is_trained_on_ends_with_the_bits_of_one_that_was_planned_so(work: Path) -> None:
    assert len(metrics(work / "on")) == 6 and metrics(work / "on") == metrics(work / "whole")
    ours, theirs = (load_file(work / name / "export" / "model.safetensors") for name in ("on", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_on_is_said_and_kept_and_the_same_command_again_does_nothing(work: Path) -> None:
    said = (work / "said").read_text()
    assert said.count("continuing from step 4 with another schedule (train.steps: 4 there, 6 here)") == 1
    assert said.count("has done its 6 steps; nothing to train") == 1
    before = {"from_step": 4, "steps": 4, "warmup_steps": 2, "min_lr_ratio": 1.0}
    assert json.loads((work / "on" / "identity.json").read_text())["trained_on"] == [before]
    assert json.loads((work / "on" / "export" / "distilled.json").read_text()) == {"step": 6, "newest": 6}


def test_a_finished_run_is_trained_on_with_another_dump_and_other_objectives_from_a_new_epoch(work: Path) -> None:
    before, after = metrics(work / "whole"), metrics(work / "more")
    assert after[:6] == before and len(after) == 9 and "alm" in after[5] and "alm" not in after[6]
    reader = DumpReader(work / "extended", seed=0)
    start = Position(int(before[-1]["epoch"]) + 1, 0)
    batches = global_batches(reader, ByteTokenizer.load(str(work / "model")), 120, 512, start)
    done = before[-1]["supervised_bytes"]
    for step, batch in zip(after[6:], batches, strict=False):
        done += sum(len(document.record.document) for document in batch.documents)
        assert step["supervised_bytes"] == done and step["epoch"] == batch.after.epoch
    [entry] = json.loads((work / "more" / "identity.json").read_text())["trained_on"]
    assert entry["from_step"] == 6 and {field.split(":")[0] for field in entry["changed"]} == {
        "dump.documents_sha256", "train.objectives.kl", "train.objectives.alm"
    }  # fmt: skip
    assert json.loads((work / "more" / "export" / "distilled.json").read_text())["step"] == 9


def identity(work: Path, run: Path, **train: Any) -> dict[str, Any]:
    recipe = make_recipe(work / "dump", work / "model", run, train)
    return run_identity(recipe, Manifest.load(work / "dump"), "s", SpecialIds(1, (1,)))


def test_only_the_schedule_may_change_and_not_to_fewer_steps_than_are_done(work: Path, tmp_path: Path) -> None:
    folder.claim(tmp_path, identity(work, tmp_path))
    (tmp_path / "checkpoints" / "step-000006").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"checkpoint of step 6, and train\.steps is 4: give 6 or more, or export an earlier"
    ):
        folder.claim(tmp_path, identity(work, tmp_path, steps=4))
    with pytest.raises(
        ValueError, match=r"another run \(.*train\.lr: 0\.001 there, 0\.5 here.*train\.steps: 6 there, 9 here"
    ):
        folder.claim(tmp_path, identity(work, tmp_path, steps=9, lr=0.5))
    for steps in (9, 12, 12):
        folder.claim(tmp_path, identity(work, tmp_path, steps=steps, min_lr_ratio=0.2))
    history = json.loads((tmp_path / "identity.json").read_text())["trained_on"]
    assert [(time["from_step"], time["steps"], time["min_lr_ratio"]) for time in history] == [(6, 6, 0.1), (6, 9, 0.2)]
    kept = {"steps": 12, "warmup_steps": 2, "min_lr_ratio": 0.2, "dtype": "float32", "decay": "matrices"}
    assert folder.begun_schedule(tmp_path) == kept


def test_an_export_is_made_anew_where_the_run_has_gone_further_and_only_there(work: Path, tmp_path: Path) -> None:
    folder.claim(tmp_path, identity(work, tmp_path, steps=4))
    (tmp_path / "export").mkdir()
    found = []
    for done, steps in [
        (4, 4),
        (4, 9),
        (6, 6),
        (6, 6),
    ]:  # finished, trained on, and ended at a checkpoint before all is done
        (tmp_path / "checkpoints" / f"step-{done:06d}").mkdir(parents=True, exist_ok=True)
        folder.claim(tmp_path, identity(work, tmp_path, steps=steps))
        if not found:
            (tmp_path / "export" / "distilled.json").write_text('{"step": 4}')
        found.append(is_due(tmp_path))
        if done == steps and found[-1]:
            (tmp_path / "export" / "distilled.json").write_text(json.dumps({"step": done}))
    assert found == [False, False, True, False]


def test_an_export_on_the_way_is_made_anew_at_the_end_and_one_that_was_chosen_at_the_end_is_kept(
    tmp_path: Path,
) -> None:
    def made(step: int, newest: int) -> bool:
        (tmp_path / "export" / "distilled.json").write_text(json.dumps({"step": step, "newest": newest}))
        return is_due(tmp_path)

    (tmp_path / "export").mkdir()
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert made(step=4, newest=4) and made(step=2, newest=4)
    assert not made(step=6, newest=6) and not made(step=2, newest=6)


def test_a_step_larger_than_the_dump_says_how_often_each_document_is_in_it() -> None:
    assert repeated(630, 630) is None
    assert "all usable records together have only 630 tokens: each record occurs about 31.7 times in every step" in str(
        repeated(630, 20_000)
    )
