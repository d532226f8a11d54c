"""Identities of recipes: later keys are left out if they say what was done before they existed."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from pipeline.config import (
    CorpusConfig,
    CoveringConfig,
    DumpConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    TransferConfig,
)
from pipeline.config.identity import added_values, identity_differences, identity_values
from pipeline.config.loading import load_recipe
from pipeline.config.section import added, stored_as
from schemas import manifest
from tests.support.added_keys import OF_A_DUMP, OF_A_RUN, use_added_keys

SMALL = "corpus: {source: a}\nteacher: {model: t}\ndump: {path: d}\nstudent: {model: m, path: p}\n"


class Inner(Section):
    """Keys below a key."""

    old: int = 1
    new: int = Field(5, json_schema_extra=added("0.2", before=2))


class Outer(Section):
    """A key of the first release, two that came later, one that has been renamed."""

    width: int = 3
    inner: Inner = Inner()
    pair: tuple[int, int] = Field((1, 2), json_schema_extra=added("0.3", before=[1, 2]))
    level: int | None = Field(None, json_schema_extra=added("0.2", before=None, stored_as="height"))
    deep: int = Field(7, json_schema_extra=stored_as("depth"))


def test_a_key_that_came_later_is_left_out_just_where_it_says_what_was_done_before_it() -> None:
    assert identity_values(Outer(inner=Inner(new=2))) == {"width": 3, "inner": {"old": 1}, "depth": 7}
    # The default has changed since the key was added: it is another dump, and says so.
    assert identity_values(Outer()) == {"width": 3, "inner": {"old": 1, "new": 5}, "depth": 7}
    found = identity_values(Outer(pair=(2, 1), level=0), exclude={"width", "inner"})
    assert found == {"pair": [2, 1], "height": 0, "depth": 7}
    assert added_values(Outer(pair=(2, 1), level=0)) == {"pair": [2, 1], "height": 0}
    assert added_values(Outer()) == {}


def test_keys_that_an_operator_names_are_held_as_they_are() -> None:
    train = TrainConfig.model_validate({"objectives": {"own.py": 0.5}})
    found = identity_values(train, exclude={"wandb"})["objectives"]
    assert found == {"ce": 0.3, "byte_ce": 0.0, "kl": 1.0, "alm": 0.0, "own.py": 0.5}  # as the first release wrote it


@pytest.mark.parametrize("prefix", ["", "dump.", "other_dumps.1."])
def test_an_absent_key_means_what_was_done_before_it_in_a_dump_and_in_a_runs_dumps(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(values: dict[str, Any]) -> dict[str, Any]:
        for name in reversed(prefix.rstrip(".").split(".") if prefix else []):
            values = {name: values}
        return values

    use_added_keys(monkeypatch)
    old, other = identity({"covering": {"beam_width": 0}}), {"beam_width": 0, "method": "new"}
    assert identity_differences(old, identity({"covering": {"beam_width": 0, "method": "as ever"}})) == []
    assert identity_differences(old, identity({"covering": other})) == [
        f"{prefix}covering.method: 'as ever' there, 'new' here"
    ]
    assert identity_differences(identity({"covering": other}), old) == [
        f"{prefix}covering.method: 'new' there, 'as ever' here"
    ]
    assert identity_differences(old, identity({"covering": {"beam_width": 0}, "arithmetic": 1})) == []
    assert identity_differences(old, identity({"covering": {"beam_width": 0}, "arithmetic": 2})) == [
        f"{prefix}arithmetic: 1 there, 2 here"
    ]


def test_every_added_key_of_a_recipe_has_a_meaning_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    use_added_keys(monkeypatch)
    for name in [*OF_A_DUMP.values(), *OF_A_RUN.values()]:
        there: dict[str, Any] = {"k": 1}
        here: dict[str, Any] = {"k": 1}
        section = here
        *sections, key = name.split(".")
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = "new"
        assert identity_differences(there, here) == [f"{name}: 'as ever' there, 'new' here"]
    assert identity_differences({}, {"train": {"objectives": {"new_term": 0.0}}}) == []


def test_a_key_that_a_release_took_away_is_no_difference_where_it_says_what_is_done_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(manifest._MEANING_IF_ABSENT, "covering.gone", 4)
    assert identity_differences({"covering": {"gone": 4}}, {"covering": {}}) == []
    assert identity_differences({"dump": {"covering": {"gone": 5}}}, {}) == ["dump.covering.gone: 5 there, 4 here"]


# What of these sections an identity tells by other fields (hashes, ids), or does not hold for it decides no content.
TOLD_OTHERWISE: dict[type[Section], set[str]] = {
    CorpusConfig: {
        "source", "split", "field", "messages", "strip", "turns", "reasoning", "id_field", "max_row_bytes", "limit",
        "skip", "unique", "exclude", "key_pattern",
    },
    TeacherConfig: {
        "model", "revision", "tokenizer", "engine", "served_model", "prompt_logprobs", "dtype", "quantization",
        "max_tokens", "overlap_tokens", "start", "end", "trust_remote_code", "license",
    },
    DumpConfig: {
        "path", "covering", "top_k", "min_prob", "shard_bytes", "zstd_level", "arithmetic", "audit_documents",
    },
}  # fmt: skip


@pytest.mark.parametrize("section", TOLD_OTHERWISE)
def test_a_new_key_of_a_dump_says_what_was_done_before_it_or_is_told_otherwise(section: type[Section]) -> None:
    """The other sections an identity holds whole: there the golden identities tell."""
    marked = {name for name, field in section.model_fields.items() if "before" in (field.json_schema_extra or {})}
    assert section.model_fields.keys() - marked == TOLD_OTHERWISE[section]


def test_a_recipes_sections_are_held_as_the_first_release_held_them() -> None:
    """Its keys, in its order: what is stored does not change, also where a recipe's key has another name now."""
    assert list(identity_values(CoveringConfig())) == [
        "beam_width",
        "branch_threshold",
        "merge_after",
        "spread_dropped",
    ]
    before = TransferConfig(input="mean", output="mean")
    student = StudentConfig(model="m", path="p", transfer=before)
    values = student.model_dump(
        mode="json", exclude={"transfer", "trained", "lora_base"}
    )  # came later, and say what was done before
    names = ["averaged_scale" if name == "averaged_row_scale" else name for name in values]
    assert identity_values(student) == dict(zip(names, values.values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "dump.", "other_dumps.1."])
def test_a_difference_in_a_renamed_key_has_the_name_that_the_recipe_has(prefix: str) -> None:
    there: dict[str, Any] = {"covering": {"merge_after": 4}}
    here: dict[str, Any] = {"covering": {"merge_after": 2}}
    for name in reversed(prefix.rstrip(".").split(".") if prefix else []):
        there, here = {name: there}, {name: here}
    assert identity_differences(there, here) == [f"{prefix}covering.rejoin_after_tokens: 4 there, 2 here"]
    assert identity_differences({"student": {"averaged_scale": 1}}, {"student": {"averaged_scale": 0.9}}) == [
        "student.averaged_row_scale: 1 there, 0.9 here"
    ]


def test_an_old_name_is_read_with_a_warning_and_an_override_of_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_added_keys(monkeypatch)
    recipe, settings = tmp_path / "r.yaml", tmp_path / "s.yaml"
    recipe.write_text(SMALL + "train: {old_solver: muon}")
    settings.write_text("train: {old_solver: lion}")

    def optimizer(*overrides: str) -> str:
        return str(getattr(load_recipe(recipe, overrides).train, "solver"))  # noqa: B009

    assert optimizer() == "muon"
    said = capsys.readouterr().err
    assert "r.yaml: train.old_solver is called train.solver now; the next release knows only the new" in said
    assert optimizer("train.solver=adam") == optimizer("train.old_solver=adam") == "adam"
    assert "override 'train.old_solver=adam': train.old_solver is called" in capsys.readouterr().err
    assert optimizer(str(settings)) == optimizer("train={old_solver: lion}") == "lion"
    recipe.write_text(SMALL + "train: {solver: sgd}")
    capsys.readouterr()
    assert optimizer() == "sgd" and optimizer("train.old_solver=adam") == "adam"
    recipe.write_text(SMALL + "train: {old_solver: muon, solver: sgd}")
    with pytest.raises(
        ValueError, match=r"r\.yaml: train\.old_solver is the old name of train\.solver, and both are given"
    ):
        load_recipe(recipe)


def test_without_a_rename_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SMALL)
    load_recipe(path, ["train.steps=3"])
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="'old_solver' is not a key of train"):
        load_recipe(path, ["train.old_solver=x"])
