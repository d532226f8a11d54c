"""Changes with which a begun run may be trained on, by name; anything else is refused, with the way on."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.runs import folder, train_on
from stage2_student.runs.identity import run_identity
from tests.support.small_dumps import make_dump, make_recipe


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dump(tmp_path_factory.mktemp("dump") / "dump", num_records=4, num_shards=2)


def identity(dump: Path, student: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    recipe = make_recipe(
        dump, Path("/model"), Path("/run"), train, **({"interface": "token_marginal"} | (student or {}))
    )
    return run_identity(recipe, Manifest.load(dump), "s", SpecialIds(1, (1,)))


@pytest.fixture
def run(dump: Path, tmp_path: Path) -> Path:
    """Make a run of 6 steps with a checkpoint of the last."""
    folder.claim(tmp_path, identity(dump))
    (tmp_path / "checkpoints" / "step-000006").mkdir(parents=True)
    return tmp_path


OTHER_LOSS = {"objectives": {"ce": 1.0, "byte_ce": 1.0, "kl": 3.0, "alm": 10.0}, "kl_temperature": 2.0}


@pytest.mark.parametrize(
    ("train", "student", "name"),
    [
        ({"lr": 0.5}, {}, "lr"),
        ({"batch_tokens": 60}, {}, "batch_tokens"),
        (OTHER_LOSS, {"max_doubt": 0.5}, "objectives"),
    ],
    ids=["lr", "batch_tokens", "objectives"],
)
def test_a_change_is_refused_until_it_is_named_and_then_recorded(
    train: dict[str, Any], student: dict[str, Any], name: str, run: Path, dump: Path
) -> None:
    ours = identity(dump, student, steps=9, **train)
    for change in ((), ("dump",)):
        with pytest.raises(
            ValueError, match=rf"another run \(.*, -o train\.change=\[{name}\] to train this run on from step 6"
        ):
            folder.claim(run, ours, change)
    folder.claim(run, ours, (name,))
    for change in ((), (name,)):  # it is the run's own identity now
        folder.claim(run, ours, change)
    [entry] = json.loads((run / "identity.json").read_text())["trained_on"]
    assert entry["from_step"] == 6 and entry["steps"] == 6 and not folder.has_other_data(run, 6)
    keys = [*(f"train.{key}" for key in train if key != "objectives"), *(f"student.{key}" for key in student)]
    assert all(any(field.startswith(f"{key}: ") for field in entry["changed"]) for key in keys)


def test_a_change_of_something_else_cannot_be_named(run: Path, dump: Path) -> None:
    ours = identity(dump, steps=9, seed=1, lr=0.5)
    with pytest.raises(ValueError, match=r"Give a new student\.path, or delete that folder"):
        folder.claim(run, ours, ("dump", "objectives", "lr", "batch_tokens"))
    assert json.loads((run / "identity.json").read_text()) == identity(dump)


def test_another_dump_gives_checkpoints_made_before_it_a_new_epoch(run: Path, dump: Path, tmp_path: Path) -> None:
    ours = identity(make_dump(tmp_path / "extended", num_records=8, num_shards=2), steps=9)
    with pytest.raises(ValueError, match=r"dump\.documents_sha256.* -o train\.change=\[dump\] "):
        folder.claim(run, ours)
    folder.claim(run, ours, ("dump",))
    assert folder.has_other_data(run, 6) and folder.has_other_data(run, 4) and not folder.has_other_data(run, 7)


def test_a_finished_run_has_no_step_left_for_a_change(run: Path, dump: Path) -> None:
    with pytest.raises(
        ValueError, match=r"done its 6 steps, and none is left .*train\.lr: .* more train\.steps than 6"
    ):
        folder.claim(run, identity(dump, lr=0.5), ("lr",))


def test_objectives_that_need_weights_no_checkpoint_has_are_refused(dump: Path, tmp_path: Path) -> None:
    alone = {"objectives": {"ce": 1.0, "byte_ce": 0.0, "kl": 0.0, "alm": 0.0}}
    for interface, run in (("causal", tmp_path / "a"), ("token_marginal", tmp_path / "b")):
        run.mkdir()
        folder.claim(run, identity(dump, {"interface": interface}, **alone))
        (run / "checkpoints" / "step-000002").mkdir(parents=True)
    ours = identity(dump, {"interface": "causal"}, steps=9)
    with pytest.raises(ValueError, match=r"the new objectives have weights of student\.interface causal, the run's"):
        folder.claim(tmp_path / "a", ours, ("objectives",))
    folder.claim(tmp_path / "b", identity(dump, steps=9), ("objectives",))


def test_another_dump_is_named_once_and_a_few_fields_one_by_one() -> None:
    many = [f"corpora.round.dump.teacher.field_{i}: None there, {i} here" for i in range(9)]
    few = [f"dump.{name}: 1 there, 2 here" for name in ("arithmetic", "coding")]
    said = train_on.in_short([*many, *few, "train.steps: 4 there, 6 here"])
    assert said == "; ".join(
        ["corpora.round.dump: another dump, or none (9 fields)", *few, "train.steps: 4 there, 6 here"]
    )
