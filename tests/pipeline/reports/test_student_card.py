"""The card of a student says where it comes from, what its teachers ask, and what was measured; nothing private."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import metadata_load

from pipeline.config import DumpRef, student_config
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.dumps import hub
from pipeline.reports.student_card import write_student_card
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.runs.identity import run_identity, union_identity
from tests.pipeline.dumps.test_hub import FakeHub
from tests.support.small_dumps import make_dump, make_recipe

BOUND = "gemma"
FIGURES = {"bits_per_byte": 1.2345, "num_documents": 7, "num_bytes": 1234, "text_sha256": "abcdef0123456789"}


class ModelHub(FakeHub):
    repo_type = "model"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run's files as training, evaluation and export leave them."""
    base, dump, run = tmp_path / "private" / "base", tmp_path / "dump", tmp_path / "run"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    make_dump(dump, num_records=4, num_shards=2, teacher=str(tmp_path / "private" / "teacher"))
    recipe = make_recipe(dump, base, run, {"steps": 9}, interface="token_marginal")
    save_recipe(recipe.with_values(teacher=recipe.teacher.model_copy(update={"license": BOUND})), dump / "recipe.yaml")
    (run / "export").mkdir(parents=True)
    save_recipe(recipe, run / "recipe.yaml")
    identity = run_identity(recipe, Manifest.load(dump), "s", SpecialIds(1, (1,)))
    history = [{"from_step": 6, "steps": 6, "changed": ["train.lr: 0.5 there, 0.001 here"]}]
    (run / "identity.json").write_text(json.dumps({**identity, "trained_on": history}))
    (run / "metrics.jsonl").write_text('{"step": 9}\n')
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (run / "export" / name).write_text("{}")
    (run / "export" / "distilled.json").write_text('{"step": 9, "newest": 9}')
    (run / "eval.json").write_text(json.dumps({"student": {"held_out": FIGURES}}))
    return run


def card(run: Path) -> tuple[str, dict[str, Any]]:
    path = write_student_card(run, run / "export")
    return path.read_text(), dict(metadata_load(path) or {})


def test_a_card_names_base_teachers_licences_training_and_figures(run: Path) -> None:
    text, front = card(run)
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder of ours is not on a hub
    assert "| model | base |" in text and "| licence | apache-2.0 |" in text and "| revision | not pinned |" in text
    assert "BINDS its students: a student distilled from it is a Model Derivative" in text
    assert "| steps | 9 |" in text and "| train.lr | 0.001 |" in text
    assert "| 6 | train.lr: 0.5 before, 0.001 here |" in text
    assert "| student | held\\_out | 7 | 1,234 | 1.2345 | abcdef012345 |" in text and "before this export" not in text
    assert "private" not in text + (run / "export" / "training.json").read_text()
    assert json.loads((run / "export" / "training.json").read_text())["step"] == 9


@pytest.mark.parametrize(("licence", "given"), [(BOUND, "other"), (None, "other"), ("mit", "apache-2.0")])
def test_the_licence_is_the_base_models_unless_a_teachers_binds_or_is_not_known(
    licence: str | None, given: str, run: Path
) -> None:
    path = run.parent / "dump" / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    values["teacher"]["license"] = licence
    path.write_text(yaml.safe_dump(values))
    assert card(run)[1]["license"] == given


def test_a_run_without_figures_or_with_older_ones_says_so(run: Path) -> None:
    (run / "export" / "config.json").touch()
    os.utime(run / "eval.json", (1, 1))
    assert "**Measured before this export was written**" in card(run)[0]
    (run / "eval.json").unlink()
    assert "Not evaluated: `bld eval` measures" in card(run)[0]


def test_a_student_of_several_corpora_has_their_shares_and_every_teacher(run: Path) -> None:
    other = make_dump(run.parent / "other", num_records=2, num_shards=1, teacher=str(run.parent / "private" / "second"))
    recipe = load_recipe(run / "recipe.yaml")
    refs = [DumpRef(path=recipe.dump.path, corpus="a", weight=3), DumpRef(path=str(other), corpus="b", weight=1)]
    recipe = recipe.with_values(student=student_config(recipe).model_copy(update={"dumps": tuple(refs)}))
    save_recipe(recipe, run / "recipe.yaml")
    manifests = {"a": [Manifest.load(run.parent / "dump")], "b": [Manifest.load(other)]}
    identity = union_identity(recipe, manifests, "s", SpecialIds(1, (1,)))
    (run / "identity.json").write_text(json.dumps(identity))
    text, _ = card(run)
    assert "| share of a | 75.0% |" in text and "| share of b | 25.0% |" in text
    assert "| model | teacher |" in text and "| model | second |" in text
    assert "private" not in text + (run / "export" / "training.json").read_text()


def test_files_of_ones_own_and_what_changed_are_named_without_their_folders(run: Path) -> None:
    folder = run.parent / "private"
    rows, objective = folder / "rows.py", folder / "mine.py"
    rows.write_text("make_rows = None")
    recipe = load_recipe(run / "recipe.yaml")
    student = student_config(recipe)
    transfer = student.transfer.model_copy(update={"input": str(rows), "output": "mean"})
    recipe = recipe.with_values(student=student.model_copy(update={"transfer": transfer}))
    identity = run_identity(recipe, Manifest.load(run.parent / "dump"), "s", SpecialIds(1, (1,)))
    assert str(rows) in json.dumps(identity)
    changes = [
        f"dump.teacher.model: {str(folder / 'old')!r} there, 'org/new' here",
        f"own_code.{objective}: None there, 'abc' here",
        f"train.objectives.{objective}: None there, 0.1 here",
    ]
    identity["trained_on"] = [{"from_step": 6, "steps": 6, "changed": changes}]
    (run / "identity.json").write_text(json.dumps(identity))
    text, _ = card(run)
    training = json.loads((run / "export" / "training.json").read_text())
    assert "private" not in text + json.dumps(training)
    assert training["student"]["transfer"]["input"] == "rows.py" and list(training["student"]["rows_sha256"]) == [
        "rows.py"
    ]
    assert training["trained_on"][0]["changed"] == [
        "dump.teacher.model: 'old' there, 'org/new' here",
        "own_code.mine.py: None there, 'abc' here",
        "train.objectives.mine.py: None there, 0.1 here",
    ]


def test_a_student_goes_to_a_hub_as_a_model_and_a_later_checkpoint_follows_but_no_other_run(
    run: Path, tmp_path: Path
) -> None:
    write_student_card(run, run / "export")
    fake = ModelHub(tmp_path / "hub")
    hub.push_model(run / "export", "a/b", api=fake)
    uploads = [arguments["allow_patterns"] for name, arguments in fake.calls if name == "upload_folder"]
    assert uploads[0] == ["*.safetensors"] and uploads[1][-1] == "config.json"
    assert [arguments["private"] for name, arguments in fake.calls if name == "create_repo"] == [True]
    pushed = {path.name for path in (tmp_path / "hub/a/b").iterdir()}
    assert pushed == {path.name for path in (run / "export").iterdir()}
    hub.push_model(run / "export", "a/b", api=fake)
    path = run / "export" / "training.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"student": values["student"] | {"tokenizer_sha256": "other"}}))
    with pytest.raises(
        ValueError, match=r"a/b holds another model: student\.tokenizer_sha256: 's' there, 'other' here"
    ):
        hub.push_model(run / "export", "a/b", api=fake)
    (tmp_path / "hub/a/b/training.json").unlink()
    with pytest.raises(ValueError, match=r"holds another model: it was not pushed from a run\. Push to a new"):
        hub.push_model(run / "export", "a/b", api=fake)
    path.unlink()
    with pytest.raises(ValueError, match=r"is not an exported student: it has no training\.json"):
        hub.push_model(run / "export", "a/b", api=fake)
