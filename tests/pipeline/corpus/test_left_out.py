"""What is told of rows that are left out: news where the recipe asks for it, else a warning with the first place."""

import pytest

from pipeline.corpus.left_out import tell_left_out


def test_only_rows_that_the_recipe_does_not_ask_to_leave_out_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    places = {"a duplicate": "a.jsonl, line 3", "in an excluded corpus": "a.jsonl, line 1", "empty text": "b.txt"}
    tell_left_out({"left out: a duplicate": 2, "left out: in an excluded corpus": 1, "left out: empty text": 1}, places)
    asked, excluded, fault = capsys.readouterr().err.splitlines()
    assert asked.endswith("2 rows are left out, as the recipe asks: a duplicate")
    assert excluded.endswith("1 row is left out, as the recipe asks: in an excluded corpus")
    assert "warning" not in asked + excluded
    assert fault.endswith("warning: 1 row is left out: empty text; the first: b.txt")
