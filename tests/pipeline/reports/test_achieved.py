"""The last lines of `bld report`: what the student has learned, in figures, and what to do next."""

from pathlib import Path

import pytest
import yaml

from pipeline.reports.achieved import achieved
from pipeline.reports.runs import read_run
from schemas.manifest import write_json
from tests.pipeline.cli.test_app import run_main


def make_run(folder: Path, student: float, teacher: float = 1.09, text: str = "a") -> Path:
    (folder / "export").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 40}\n')
    figures = {"start": (1.24, "a"), "student": (student, "a"), "teacher": (teacher, text)}
    write_json(
        folder / "eval.json",
        {model: {"held_out": {"bits_per_byte": bits, "text_sha256": of}} for model, (bits, of) in figures.items()},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"train": {"steps": 40}}))
    return folder


def test_the_report_ends_with_what_the_student_learned_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("run"), 1.165)
    (run / "start").mkdir()
    write_json(run / "start" / "transfer.json", {"copied": 1})
    assert run_main(monkeypatch, "report", "run") == 0
    said = capsys.readouterr()
    assert said.out == "run/report.html\n"  # for scripts
    first, meaning, following = (line.split(": ", 1)[1] for line in said.err.splitlines())
    assert first == (
        "run: after 40 steps the student, moved to another tokenizer, needs 1.165 bits per byte on held out text, "
        "1.240 before training, its teacher 1.090: 50% of the way to its teacher"
    )
    assert "fewer is better" in meaning
    assert following == (
        "next: open run/report.html in a browser; run/export is the student, a plain Hugging Face model; for your own "
        "text and models, copy run/recipe.yaml and change its sources and paths"
    )


@pytest.mark.parametrize(
    ("student", "teacher", "ends"),
    [
        (1.3, 1.09, "it is now further from its teacher than at its start"),
        (1.2, 1.25, "it began no worse than its teacher"),
    ],
)
def test_a_student_that_did_not_come_closer_is_told_so(
    tmp_path: Path, student: float, teacher: float, ends: str
) -> None:
    [first, *_] = achieved([read_run(make_run(tmp_path / "run", student, teacher))], tmp_path / "page.html")
    assert first.endswith(ends)


def test_nothing_is_said_of_figures_of_other_text_and_a_run_without_any_is_told_how_to_get_them(tmp_path: Path) -> None:
    [only] = achieved([read_run(make_run(tmp_path / "run", 1.1, text="b"))], tmp_path / "page.html")
    assert only.startswith("next: `bld eval RECIPE` measures what the student has learned")
    both = [read_run(tmp_path / "run"), read_run(make_run(tmp_path / "other", 1.2))]
    told = list(achieved(both, tmp_path / "page.html"))
    assert len(told) == 3 and told[0].startswith(str(tmp_path / "other"))
