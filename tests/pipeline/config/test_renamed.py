"""Renamed keys: an operator's old names are read with a warning, those of a stored recipe in silence."""

from pathlib import Path

import pytest

from pipeline.config.loading import load_recipe, parse_recipe, read_values, save_recipe
from pipeline.reports.runs import differences, read_run
from tests.support.old_names import NEW_OF, with_old_names

TEXT = """
corpus: {source: a}
teacher: {model: t}
dump: {path: d, covering: {beam_width: 2, rejoin_after_tokens: 2, redistribute_dropped: true}}
placement: {max_engines: 4, max_engine_failures: 5}
student: {model: m, path: p, averaged_row_scale: 0.9}
"""
OLD = with_old_names(TEXT)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Write an operator's recipe with the old name of every renamed key."""
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def test_every_old_name_is_read_with_a_warning_and_saved_as_the_new_one(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(old)
    warned = capsys.readouterr().err
    for name, new in NEW_OF.items():
        assert f"old.yaml: {name} is called {new} now; the next release knows only the new name" in warned
    assert recipe == parse_recipe(TEXT, "new") and capsys.readouterr().err == ""
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", NEW_OF)
def test_an_override_of_an_old_name_counts_and_warns(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = "false" if name.endswith("dropped") else "1"
    recipe = load_recipe(old, [f"{name}={value}"])
    assert f"override '{name}={value}': {name} is called {NEW_OF[name]}" in capsys.readouterr().err
    assert recipe == load_recipe(old, [f"{NEW_OF[name]}={value}"]) != load_recipe(old)


@pytest.mark.parametrize("beside", ["manifest.json", "identity.json"])
def test_the_recipe_that_an_earlier_release_stored_with_a_dump_or_a_run_is_read_in_silence(
    tmp_path: Path, beside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "recipe.yaml"
    stored.write_text(OLD)
    load_recipe(stored)  # an operator's: nothing says that it is stored
    assert "is called" in capsys.readouterr().err
    (tmp_path / beside).write_text("{}")
    assert load_recipe(stored) == parse_recipe(OLD, "stored", is_stored=True) == parse_recipe(TEXT, "new")
    assert read_values(stored)["student"]["averaged_row_scale"] == 0.9
    assert capsys.readouterr().err == ""
    load_recipe(stored, ["placement.most_engines=2"])
    assert capsys.readouterr().err.count("is called") == 1  # the override is the operator's


def test_a_report_compares_an_old_runs_recipe_with_a_new_ones_by_the_new_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("old", OLD), ("new", TEXT.replace("0.9", "0.85"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')
        (tmp_path / name / "recipe.yaml").write_text(text)
    runs = [read_run(tmp_path / name) for name in ("old", "new")]
    assert differences(runs) == [["student.averaged_row_scale", "0.9", "0.85"]]
    assert capsys.readouterr().err == ""
