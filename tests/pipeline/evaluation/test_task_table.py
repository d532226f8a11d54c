"""The table of tasks: a row per task that was asked for, each with the figure that stands for it."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.evaluation.task_table import load_tasks, print_tasks, save_tasks, table_rows
from pipeline.runtime.harness_figures import task_figures

RESULTS: dict[str, dict[str, Any]] = {
    "plain": {
        "results": {
            "piqa": {
                "alias": "piqa",
                "acc,none": 0.5,
                "acc_stderr,none": 0.02,
                "acc_norm,none": 0.75,
                "acc_norm_stderr,none": 0.01,
            },
            "mmlu": {"acc,none": 0.4, "acc_stderr,none": "N/A", "alias": "mmlu"},
            "mmlu_stem": {"acc,none": 0.3, "acc_stderr,none": 0.1},
            "mmlu_anatomy": {"acc,none": 0.2, "acc_stderr,none": 0.1},
            "mmlu_law": {"acc,none": 0.6, "acc_stderr,none": 0.1},
            "tasks_without_figure": {"alias": "a group"},
        },
        "group_subtasks": {"piqa": [], "mmlu": ["mmlu_stem", "mmlu_law"], "mmlu_stem": ["mmlu_anatomy"]},
        "n-shot": {"piqa": 0, "mmlu_anatomy": 0, "mmlu_law": 5},
        "n-samples": {name: {"original": 9, "effective": 4} for name in ("piqa", "mmlu_anatomy", "mmlu_law", "gsm8k")},
    },
    "chat": {
        "results": {"gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.5}},
        "n-shot": {"gsm8k": 5},
        "n-samples": {"gsm8k": {"original": 9, "effective": 4}},
    },
}


def test_a_group_stands_for_its_tasks_and_the_first_metric_for_a_task() -> None:
    figures = task_figures(RESULTS, {})
    assert list(figures) == ["piqa", "mmlu", "gsm8k"]
    assert figures["piqa"] == ("acc_norm", 0.75, 0.01, "0", 4)
    assert figures["mmlu"] == ("acc", 0.4, None, "0-5", 8)
    assert figures["gsm8k"] == ("exact_match,strict-match", 0.0, None, "5", 4)


def test_a_recipe_can_name_another_metric() -> None:
    metrics = {"piqa": "acc", "gsm8k": "exact_match,flexible-extract"}
    figures = task_figures(RESULTS, metrics)
    assert (figures["piqa"].value, figures["gsm8k"].value) == (0.5, 0.5)
    with pytest.raises(ValueError, match="piqa has no 'f1'; it has acc,none, acc_norm,none"):
        task_figures(RESULTS, {"piqa": "f1"})


def test_others_figures_stand_beside_ours() -> None:
    head, rows = table_rows({"start": {}, "student": RESULTS}, {}, {"BLD": {"piqa": 75.68}})
    assert head == ["task", "metric", "shots", "questions", "start", "student", "BLD (published)"]
    assert rows[0] == ["piqa", "acc_norm", "0", "4", "-", "75.00 ± 1.00", "75.68"]
    assert rows[1] == ["mmlu", "acc", "0-5", "8", "-", "40.00", "-"]


def test_a_printed_table_is_whole_however_narrow_the_screen() -> None:
    text = StringIO()
    published = {name: {"piqa": 75.68} for name in ("original", "SFT", "DSKD", "MinED", "ALM + SFT", "teacher")}
    found = dict.fromkeys(("start", "student", "teacher"), RESULTS)
    print_tasks(found, {"gsm8k": "exact_match,flexible-extract"}, published, Console(file=text, width=80))
    said = text.getvalue()
    assert "exact_match,flexible-extract" in said and "teacher (published)" in said and "…" not in said
    assert said.count("75.00 ± 1.00") == 3 and said.count("75.68") == 6


def test_what_is_saved_is_loaded_again_and_answers_lie_beside_it(tmp_path: Path) -> None:
    chat = {**RESULTS["chat"], "samples": {"gsm8k": [{"doc_id": 0}, {"doc_id": 1}]}}
    written = save_tasks({"plain": RESULTS["plain"], "chat": chat}, tmp_path)
    assert [path.name for path in written] == ["plain.json", "chat.gsm8k.jsonl", "chat.json"]
    assert load_tasks(tmp_path) == RESULTS
    assert load_tasks(tmp_path / "none") == {}
