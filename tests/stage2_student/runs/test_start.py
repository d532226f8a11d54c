"""`bld start`: the start alone, which a run then begins from."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import EvalConfig, Recipe
from pipeline.evaluation.start_table import print_start
from stage2_student.model.initial_student import load_start
from stage2_student.model.untie import is_tied
from stage2_student.runs import folder
from stage2_student.runs.start import make_start
from tests.support.small_dumps import make_recipe
from tests.support.tiny import tiny_model

TEXTS = ["the thing and the end", "in the land on the other end", "andé"]


def recipe(place: Path, **student: Any) -> Recipe:
    """Make a recipe whose student moves to another tokenizer, with text to evaluate."""
    if not (place / "new").exists():
        tiny_model(place / "old")
        tiny_model(place / "new", merges=["t h", "o n", "a n", "Ġ t"])
        (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made = make_recipe(place, place / "old", place / "run", {}, tokenizer=str(place / "new"), **student)
    return made.with_values(eval=EvalConfig(source=str(place / "texts.jsonl")))


def test_a_start_says_how_its_rows_were_made_and_where_it_stands(tmp_path: Path) -> None:
    figures = make_start(recipe(tmp_path, transfer={"output": "first_likelihood", "tie": "untie"}))
    rows, text = figures["rows"], figures["text"]["held_out"]
    assert (rows["input"], rows["output"], rows["tied"]) == ("mean", "first_likelihood", False)
    assert (
        rows["averaged"] == 2
        and rows["seconds"] >= 0
        and rows["folded_bias"].keys() == {"mean", "deviation", "bits_per_byte"}
    )
    assert text["buckets"]["made"]["share_of_tokens"] > 0 and text["num_documents"] == 3
    assert json.loads((tmp_path / "run" / "start.json").read_text()) == figures
    assert not is_tied(load_start(tmp_path / "run" / "start", False))
    console = Console(record=True, width=120)
    print_start(figures, console)
    said = console.export_text()
    assert "2 averaged" in said and "head: first_likelihood" in said and "tokens of made rows" in said


def test_a_start_is_made_once_until_the_recipe_asks_for_another(tmp_path: Path) -> None:
    make_start(recipe(tmp_path))
    weights = tmp_path / "run" / "start" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert make_start(recipe(tmp_path), limit=1)["text"]["held_out"]["num_documents"] == 1
    assert weights.stat().st_mtime_ns == made
    figures = make_start(recipe(tmp_path, transfer={"input": "last", "output": "last"}))
    assert figures["rows"]["input"] == "last" and weights.stat().st_mtime_ns != made
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    begun = {"student": {"transfer": {"input": "last", "output": "last"}}, "train": {}}
    (tmp_path / "run" / "identity.json").write_text(json.dumps(begun))
    make_start(recipe(tmp_path))  # the recipe is silent: the run's own
    with pytest.raises(ValueError, match="holds checkpoints of a run that began from another start"):
        make_start(recipe(tmp_path, transfer={"input": "first", "output": "last"}))


@pytest.mark.parametrize("same", [True, False])
def test_a_new_run_begins_from_the_start_of_its_recipe_and_from_no_other(same: bool, tmp_path: Path) -> None:
    wanted = recipe(tmp_path)
    make_start(wanted)
    assert wanted.student is not None
    stored = json.loads((tmp_path / "run" / "start" / "made_from.json").read_text())
    student = {**stored, "lora_rank": 0, **({} if same else {"averaged_scale": 0.5})}
    folder.claim(tmp_path / "run", {"student": student})
    assert (tmp_path / "run" / "start").exists() == same


def test_rows_that_differ_are_refused_for_a_tied_head_with_the_way_out(tmp_path: Path) -> None:
    match = (
        r"mean rows for the input and first_likelihood .* \(llama\) is its embedding; set student\.transfer\.tie=untie"
    )
    with pytest.raises(ValueError, match=match):
        make_start(recipe(tmp_path, transfer={"output": "first_likelihood"}))
    assert not (tmp_path / "run" / "start").exists()
