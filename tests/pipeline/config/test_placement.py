"""Placement: the keys of the last release hold under their old names."""

from pathlib import Path

import pytest

from pipeline.config.loading import load_recipe, save_recipe

OLD = "corpus: {source: a}\nteacher: {model: t}\ndump: {path: d}\nplacement: {most_engines: 4, engine_attempts: 5}\n"


def test_old_names_of_engine_limits_are_read_with_a_warning_and_saved_as_the_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, saved = tmp_path / "old.yaml", tmp_path / "saved.yaml"
    path.write_text(OLD)
    recipe = load_recipe(path, ["placement.most_engines=2"])
    assert (recipe.placement.max_engines, recipe.placement.max_engine_failures) == (2, 5)
    warned = capsys.readouterr().err
    assert "old.yaml: placement.most_engines is called placement.max_engines now" in warned
    assert "old.yaml: placement.engine_attempts is called placement.max_engine_failures now" in warned
    save_recipe(recipe, saved)
    assert load_recipe(saved) == recipe and capsys.readouterr().err == ""
