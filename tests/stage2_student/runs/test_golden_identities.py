"""Runs begun by an earlier release continue under this one, and under one with more keys.

Differences are refused by name.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Recipe, TransferConfig
from pipeline.config.loading import load_recipe
from pipeline.runtime import dtypes
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest, write_json
from stage2_student.runs import folder, schedule
from stage2_student.runs.begun import as_begun
from stage2_student.runs.checkpoints import checkpoint_steps
from stage2_student.runs.identity import run_identity
from tests.support.added_keys import OF_A_RUN, use_added_keys
from tests.support.golden_identities import DUMPS, OBJECTIVE, RECIPES, RUNS
from tests.support.old_names import with_new_names

NAMES = list(RECIPES)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill the current folder with recipes and the release's runs, each with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OBJECTIVE)
    Path("deepspeed.json").write_text('{"gradient_accumulation_dtype": "fp32"}\n')
    for name in NAMES:
        Path(f"{name}.yaml").write_text(yaml.safe_dump(RECIPES[name]))
        (run(name) / "checkpoints" / "step-000001").mkdir(parents=True)
        write_json(run(name) / "identity.json", golden(name))
    return tmp_path


def run(name: str) -> Path:
    return Path(f"run-{name}")


def golden(name: str) -> dict[str, Any]:
    return dict(json.loads((RUNS / f"identity-arithmetic-2-{name}.json").read_text(encoding="utf-8")))


def continued(name: str, *overrides: str) -> Recipe:
    """Resolve the recipe as a start does, with the student's files as they were."""
    recipe = load_recipe(f"{name}.yaml", [f"train.max_tokens={golden(name)['train']['max_tokens']}", *overrides])
    return as_begun(recipe)[0]


def identity(name: str, recipe: Recipe) -> dict[str, Any]:
    """Return the identity of a run on the same release's dumps; hashes and ids as they were."""
    theirs = golden(name)
    student = theirs["student"]
    manifest = Manifest.model_validate_json((DUMPS / f"manifest-arithmetic-2-{name}.json").read_text(encoding="utf-8"))
    others = [
        manifest.model_copy(update={"identity": {k: v for k, v in other.items() if k != "documents_sha256"}})
        for other in theirs.get("other_dumps", {}).values()
    ]
    ends = SpecialIds(student["start_id"], (student["end_id"],))
    found = run_identity(recipe, manifest, student["tokenizer_sha256"], ends, others)
    if "template_sha256" in student:
        found["student"]["template_sha256"] = student["template_sha256"]
    return found


@pytest.mark.parametrize("keys", ["this release's keys", "more keys"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_a_release_began_goes_on_and_its_stored_identity_stays_the_same(
    name: str, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if keys == "more keys":
        use_added_keys(monkeypatch)
    ours = identity(name, continued(name))
    assert ours == golden(name)  # what is stored of the same recipe has not changed
    folder.claim(run(name), ours)
    assert json.loads((run(name) / "identity.json").read_text()) == golden(name)
    assert checkpoint_steps(run(name)) == [1]
    folder.claim(run(name), identity(name, continued(name, "train.steps=5")))
    assert json.loads((run(name) / "identity.json").read_text())["trained_on"][0]["steps"] == 1


def test_a_run_begun_under_the_old_names_of_keys_goes_on_under_the_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    operators = Path("everything.yaml")
    assert "averaged_scale" in operators.read_text()
    operators.write_text(with_new_names(operators.read_text()))
    assert identity("everything", continued("everything")) == golden("everything")
    folder.claim(run("everything"), golden("everything"))
    with pytest.raises(ValueError, match=r"another run \(student\.averaged_row_scale: 0\.9 there, 0\.8 here\)"):
        folder.claim(
            run("everything"), identity("everything", continued("everything", "student.averaged_row_scale=0.8"))
        )
    assert "is called" not in capsys.readouterr().err


@pytest.mark.parametrize(("key", "named"), OF_A_RUN.items())
def test_another_value_of_a_key_that_came_later_is_refused_by_its_name(
    key: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_added_keys(monkeypatch)
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"another run \({named}: 'as ever' there, 'new' here\)\. Give a new"):
            folder.claim(run(name), identity(name, continued(name, f"{key}=new")))
    with pytest.raises(ValueError, match=r"another run \(train\.objectives\.new_term: 0\.0 there, 0\.5 here\)"):
        folder.claim(run("default"), identity("default", continued("default", "train.objectives.new_term=0.5")))


@pytest.mark.parametrize(
    "change",
    [
        lambda identity: identity["train"].pop("max_tokens") and None,
        lambda identity: identity["train"].update(some_key=None),
        lambda identity: identity["deepspeed"].update(zero_optimization={}),
        lambda identity: identity["student"].update(revision=None),
        lambda identity: identity["dump"].pop("arithmetic"),
        lambda identity: identity.update(arithmetic=1),
    ],
)
def test_a_refusal_always_names_a_field_and_what_differs_in_none_goes_on(change: Any) -> None:
    stored = golden("default")
    change(stored)
    write_json(run("default") / "identity.json", stored)
    for steps in (1, 5):
        try:
            folder.claim(run("default"), identity("default", continued("default", f"train.steps={steps}")))
        except ValueError as error:
            assert ": " in str(error).split("another run (", 1)[1].split(")")[0]
        assert checkpoint_steps(run("default")) == [1]


def test_a_run_that_decayed_every_weight_goes_on_so_and_a_new_one_decays_matrices() -> None:
    recipe, remarks = as_begun(load_recipe("everything.yaml"))
    assert recipe.train.decay == "all" and "train.decay is all, as the run began" in remarks
    with pytest.raises(ValueError, match=r"another run \(train\.decay: 'all' there, 'matrices' here\)"):
        folder.claim(run("everything"), identity("everything", continued("everything", "train.decay=matrices")))
    (run("everything") / "checkpoints" / "step-000001").rmdir()
    assert as_begun(load_recipe("everything.yaml"))[0].train.decay == "matrices"


def test_a_run_goes_on_in_the_dtype_it_was_begun_in_on_a_machine_that_would_begin_it_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = golden("default")["train"]["dtype"]
    here = {"bfloat16": "float32", "float32": "bfloat16"}[stored]
    monkeypatch.setattr(dtypes, "cpu_build", lambda: here == "float32")
    monkeypatch.setattr(dtypes, "slow_bfloat16", lambda: True)
    dtypes.natural_dtype.cache_clear()
    try:
        recipe = load_recipe("default.yaml")
        found, remarks = schedule.continued(recipe, folder.begun_schedule(run("default")))
        assert recipe.train.dtype == here and found.train.dtype == stored
        assert f"train.dtype is {stored}, as the run began" in remarks
        folder.claim(run("default"), identity("default", continued("default")))
        with pytest.raises(ValueError, match=rf"another run \(train\.dtype: '{stored}' there, '{here}' here\)"):
            folder.claim(run("default"), identity("default", continued("default", f"train.dtype={here}")))
        assert schedule.continued(recipe, folder.begun_schedule(Path("fresh")))[0].train.dtype == here
    finally:
        dtypes.natural_dtype.cache_clear()


def test_a_run_keeps_the_rows_that_it_began_with_when_the_defaults_are_others() -> None:
    recipe = load_recipe("default.yaml", ["train.max_tokens=512"])
    later = TransferConfig.model_construct(_fields_set=set(), input="mean", output="first", tie="untie")
    assert recipe.student is not None
    kept, remarks = as_begun(recipe.with_values(student=recipe.student.model_copy(update={"transfer": later})))
    assert kept.student is not None and kept.student.transfer == TransferConfig(input="mean", output="mean")
    assert "student.transfer.tie is keep, as the run began" in remarks
    folder.claim(run("default"), identity("default", kept))
    asked, remarks = as_begun(load_recipe("default.yaml", ["train.max_tokens=512", "student.transfer.tie=untie"]))
    assert not any("student.transfer.tie" in remark for remark in remarks)
    with pytest.raises(ValueError, match=r"another run \(student\.transfer\.tie: 'keep' there, 'untie' here\)"):
        folder.claim(run("default"), identity("default", asked))
    fresh = load_recipe("default.yaml", ["student.path=fresh", "student.transfer.output=last"])
    begun, _ = as_begun(fresh)
    assert begun.student is not None and begun.student.transfer.output == "last"
