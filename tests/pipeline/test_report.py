"""The report is one page that needs nothing else, and nothing in it is taken for HTML."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline.report import page, read_metrics, read_run, write_report
from tests.pipeline.dumps import make_dump


def make_run(folder: Path, lr: float, dump: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {"step": i, "ce": 3.0 - i, "byte_ce": 2.0, "kl": 0.5, "loss": 5.0, "lr": lr, "tokens_per_second": 10.0}
        for i in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "eval.json").write_text(json.dumps({"<student>": {"held & out": {"bits_per_byte": 1.23456}}}))
    recipe = {"train": {"lr": lr, "seed": 0}, "dump": {"path": str(dump or folder / "none")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_page_refers_to_nothing_outside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.1, make_dump(tmp_path / "dump"))
    text = write_report([run], run / "report.html").read_text()
    assert "://" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert text.count("<svg") == 6  # the curves that these metrics hold
    assert "prefers-color-scheme: dark" in text


def test_ids_of_the_inline_plots_do_not_clash(tmp_path: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page([read_run(make_run(tmp_path / "run", 0.1))]))
    assert len(ids) == len(set(ids))


def test_names_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>", 0.1, make_dump(tmp_path / "dump"))
    text = page([read_run(run), read_run(run)])
    assert "<script>" not in text and "<student>" not in text and "<b>teacher" not in text
    assert "&lt;student&gt;" in text and "held &amp; out" in text and "1.2346" in text


def test_only_the_keys_that_differ_are_shown(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, lr)) for name, lr in (("a", 0.1), ("b", 0.2))]
    table = page(runs).split("What differs between the recipes")[1]
    assert "train.lr" in table and "train.seed" not in table


def test_a_resumed_step_counts_once_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "ce": 1}\n{"step": 2, "ce": 2}\n{"step": 2, "ce": 3}\n{"step": 3, "c')
    assert read_metrics(path) == [{"step": 1, "ce": 1}, {"step": 2, "ce": 3}]
    path.write_text('{"step": 1\n{"step": 2, "ce": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a student's run"):
        read_run(tmp_path)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No metrics yet" in page([read_run(tmp_path)])
