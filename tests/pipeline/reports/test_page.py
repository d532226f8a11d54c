"""The report is one page that needs nothing else, and none of its content is taken for HTML."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.evaluation.task_table import save_tasks
from pipeline.reports.curves import (
    AXES,
    NUM_COLOURS,
    PLOTS,
    Series,
    draw,
    format_ticks,
    nice_scale,
    running_mean,
    thinned,
)
from pipeline.reports.html import asset
from pipeline.reports.page import COLOURS, page, write_report
from pipeline.reports.runs import differences, read_dumps, read_metrics, read_run, short_names
from schemas.manifest import write_json
from tests.support.browser import browser as browser
from tests.support.browser import open_page
from tests.support.readable_dumps import make_dump

NASTY = "</script><script>document.title='owned'</script>"


def make_run(folder: Path, lr: float, dump: Path | None = None, **train: Any) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {
            "step": i,
            "ce": 3.0 - i,
            "byte_ce": 2.0,
            "kl": 0.5,
            "loss": 5.0,
            "lr": lr,
            "tokens_per_second": 10.0,
            "supervised_bytes": 1000 * i,
            "seconds": 2.0 * i,
        }
        for i in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "eval.json").write_text(json.dumps({"<student>": {"held & out": {"bits_per_byte": 1.23456}}}))
    recipe = {"train": {"lr": lr, "seed": 0, **train}, "dump": {"path": str(dump or folder / "none")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def page_of(*folders: Path) -> str:
    return page([read_run(folder) for folder in folders], short_names(folders))


def section(text: str, title: str) -> str:
    return text.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_page_refers_to_nothing_outside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.1, make_dump(tmp_path / "dump"))
    write_report([run], run / "report.html")
    text = (run / "report.html").read_text()
    assert "://" not in text and "default-src 'none'" in text
    assert not re.search(r"""\s(?:src|href|on\w+)=|@import|url\(""", text)
    assert text.count("<svg") == 6 * 3  # the curves that these metrics hold, over each axis
    assert "prefers-color-scheme: dark" in text


def test_a_moved_students_start_is_told(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run", 0.1), make_run(tmp_path / "other", 0.1)
    (run / "start").mkdir()
    made = {"copied": 7, "averaged": 12345, "fallback": 0, "input": "<mean>", "output": "first", "tied": False}
    write_json(run / "start" / "transfer.json", made | {"seconds": 8.5})
    told = section(page_of(run, other), "Start")
    assert "12,345" in told and "&lt;mean&gt;" in told and "its own" in told and "fallback" not in told
    assert told.count("<tr>") == 2 and "<h2>Start</h2>" not in page_of(other)


def test_tasks_stand_beside_what_others_have_published(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run", 0.1), make_run(tmp_path / "other", 0.1)
    values = {"<acc>,none": 0.5, "<acc>_stderr,none": 0.02, "f1,none": 0.75}
    results = {"results": {"piqa": values}, "n-shot": {"piqa": 0}, "n-samples": {"piqa": {"effective": 7}}}
    save_tasks({"plain": results}, run / "tasks" / "student")
    assert "50.00 ± 2.00" in page_of(run) and "&lt;acc&gt;" in page_of(run) and "<acc>" not in page_of(run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["eval"] = {"tasks": {"plain": {"metrics": {"piqa": "f1"}}}, "published": {"BLD": {"piqa": 75.68}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shown = section(page_of(run, other), "Tasks, in percent")
    assert shown.count("<table>") == 1 and "75.00" in shown and "75.68" in shown and "50.00" not in shown
    assert "Tasks, in percent" not in page_of(other)


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / NASTY.replace("/", "|"), 0.1, make_dump(tmp_path / "dump"))
    other = make_run(tmp_path / "other", 0.1, reason=NASTY)
    text = page_of(folder, other)
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<student>" not in text and "<b>teacher" not in text
    assert "&lt;student&gt;" in text and "held &amp; out" in text and "1.2346" in text


def test_only_the_keys_that_differ_are_shown(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, lr, tmp_path / "none") for name, lr in (("a", 0.1), ("b", 0.2))]
    assert differences([read_run(folder) for folder in folders]) == [["train.lr", "0.1", "0.2"]]
    table = section(page_of(*folders), "Differences between the recipes")
    assert "train.lr" in table and "train.seed" not in table


def test_a_recipe_that_is_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    old = {"corpus": {"source": "c"}, "teacher": {"model": "t"}, "dump": {"path": "d"}}
    for name, recipe in (("old", old), ("new", {**old, "train": {"keep_last": 3, "wandb": {"project": "p"}}})):
        make_run(tmp_path / name, 0.1)
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {row[0]: row[1:] for row in differences([read_run(tmp_path / name) for name in ("old", "new")])}
    assert found["train.wandb.project"] == [None, "p"] and "train.keep_last" not in found


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


def test_runs_that_are_not_done_say_so(tmp_path: Path) -> None:
    empty, half = tmp_path / "empty", make_run(tmp_path / "half", 0.1, steps=9)
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    (half / "eval.json").unlink()
    assert "No metrics yet" in page_of(empty) and "No eval.json yet" in page_of(empty)
    rows = section(page_of(empty, half, make_run(tmp_path / "done", 0.1, steps=2)), "Runs").split("<tr>")[2:]
    assert ["no step yet" in rows[0], "step 2 of 9" in rows[1], "finished" in rows[2]] == [True] * 3
    assert ["not evaluated" in row for row in rows] == [True, True, False]


def test_names_are_as_short_as_tells_runs_apart() -> None:
    paths = ["/a/runs/x/student", "/a/runs/y/student", "/b/runs/x/student"]
    assert short_names([Path(path) for path in paths[:1]]) == ["x/student"]
    assert short_names([Path(path) for path in paths[:2]]) == ["x", "y"]
    assert short_names([Path(path) for path in paths]) == ["a/runs/x", "a/runs/y", "b/runs/x"]
    assert short_names([Path("/r"), Path("/r/s")]) == ["r", "s"]


def test_the_way_from_start_to_teacher_is_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0.1)
    figures = {
        name: {"held_out": {"bits_per_byte": b}} for name, b in (("start", 2.0), ("student", 1.25), ("teacher", 1.0))
    }
    (folder / "eval.json").write_text(json.dumps(figures))
    assert "75%" in section(page_of(folder), "Evaluation")


@pytest.mark.parametrize("mark", ["num_bytes", "text_sha256"])
def test_figures_of_unlike_text_are_not_set_beside_each_other(tmp_path: Path, mark: str) -> None:
    def evaluated(name: str, student: float, teachers: str, students: str = "a") -> Path:
        folder = make_run(tmp_path / name, 0.1)
        known = [("start", 2.0, students), ("student", student, students), ("teacher", 1.0, teachers)]
        figures = {model: {"held_out": {"bits_per_byte": bits, mark: text}} for model, bits, text in known}
        (folder / "eval.json").write_text(json.dumps(figures))
        return folder

    alike = section(page_of(evaluated("one", 1.25, "a"), evaluated("two", 1.5, "a")), "Evaluation")
    assert "75%" in alike and "50%" in alike and "<b>1.2500</b>" in alike and "are not comparable" not in alike
    unlike = section(page_of(evaluated("three", 1.25, "b")), "Evaluation")
    assert "75%" not in unlike and "are not comparable" in unlike
    between = section(page_of(evaluated("four", 1.25, "a"), evaluated("five", 1.5, "b", "b")), "Evaluation")
    assert "75%" in between and "50%" in between  # within a run the text is the same
    assert "<b>1.2500</b>" not in between and "are not comparable" in between


def test_a_dump_is_found_from_where_its_run_was_started_and_shows_its_audit(tmp_path: Path) -> None:
    dump = make_dump(tmp_path / "runs/x/dump")
    write_json(dump / "audit.json", AUDIT)
    folder = make_run(tmp_path / "runs/x/student", 0.1)
    recipe = {"dump": {"path": "runs/x/dump"}, "student": {"path": "runs/x/student"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    [found] = read_dumps([read_run(folder)])
    assert found.path == dump and found.audit == AUDIT
    text = section(page_of(folder, folder), "Dump")
    for shown in ("93.40%", "3.10%", "1.131", "0.0851 nats", "a&lt;b", "bld inspect"):
        assert shown in text, shown
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"dump": {"path": "runs/y/dump"}}))
    assert "Not on this machine" in page_of(folder)


AUDIT = {
    "documents": 2,
    "positions": 262,
    "kept_mass": 0.934,
    "dropped_mass": 0.031,
    "doubt": 0.035,
    "realised_bits_per_byte": 1.131,
    "wide_covering": {"kl_nats": 0.0851, "share_off_by_0.05": 0.073},
    "worst_documents": [{"doc_id": "a<b", "kl_nats": 0.2, "total_variation": 0.03}],
}


def test_a_curve_lies_where_its_values_are() -> None:
    xs, ys = [0, 5, 10], [1.0, 3.0, 2.0]
    svg = draw(PLOTS[0], AXES[0], [Series(1, xs, ys)])
    frame, x, y = (
        [float(number) for number in re.findall(rf'data-{name}="([^"]*)"', svg)[0].split()]
        for name in ("frame", "x", "y")
    )
    [path] = re.findall(r'class="curve c1" data-run="1"><path d="M([^"]*)"', svg)
    for point, px, py in zip(path.split("L"), xs, ys, strict=True):
        left, top = map(float, point.split())
        assert (left - frame[0]) / (frame[1] - frame[0]) == pytest.approx((px - x[0]) / (x[1] - x[0]), abs=1e-3)
        assert (top - frame[2]) / (frame[3] - frame[2]) == pytest.approx((py - y[0]) / (y[1] - y[0]), abs=1e-3)
    assert draw(PLOTS[0], AXES[0], [Series(0, [], [])]) == ""


def test_a_scale_holds_all_values_between_even_ticks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = np.sort(rng.normal(size=2) * 10.0 ** rng.integers(-9, 9))
        scale = nice_scale(float(low), float(high), 4)
        assert scale.low <= low and high <= scale.high and 2 <= len(scale.ticks) <= 8
        assert np.allclose(np.diff(scale.ticks), scale.ticks[1] - scale.ticks[0])
    assert nice_scale(2.0, 2.0, 4).low < 2 < nice_scale(2.0, 2.0, 4).high
    assert format_ticks([0.8, 1.0, 1.2]) == ["0.8", "1.0", "1.2"] and format_ticks([0, 20000.0]) == ["0", "20k"]


def test_an_objective_of_the_operator_has_a_curve_beside_the_others(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.1, objectives={"kl": 1.0, "files/focal.py": 0.5, "unused.py": 0.0})
    lines = [json.loads(line) | {"focal": 0.25, "unused": 1.0} for line in (run / "metrics.jsonl").open()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page_of(run)
    drawn = list(dict.fromkeys(re.findall(r'<svg[^>]* data-key="([^"]+)"', text)))
    assert drawn[:5] == ["loss", "ce", "byte_ce", "kl", "focal"] and "unused" not in drawn
    assert "<figcaption>focal <" in text and '"focal":[0.25,0.25]' in text.replace(" ", "")


def test_a_long_curve_keeps_its_extremes() -> None:
    ys = np.random.default_rng(0).normal(size=10_000)
    ys[4321], ys[8765] = 50.0, -50.0
    points = thinned(list(range(10_000)), ys.tolist(), 100)
    assert len(points) <= 202 and points == sorted(points)
    assert {(4321, 50.0), (8765, -50.0), (0, ys[0]), (9_999, ys[-1])} <= set(points)


def test_a_noisy_curve_has_its_running_mean_over_it() -> None:
    ys = np.random.default_rng(0).normal(size=200)
    means = running_mean(ys.tolist(), 5)
    assert means == pytest.approx([ys[max(0, i - 2) : i + 3].mean() for i in range(200)])
    noisy, smooth = (draw(plot, AXES[0], [Series(0, range(200), ys.tolist())]) for plot in (PLOTS[0], LR))
    assert noisy.count('class="raw"') == 1 and noisy.count('"/></g>') == 2 and 'class="raw"' not in smooth


LR = next(plot for plot in PLOTS if plot.key == "lr")


def test_style_and_script_know_as_many_colours_as_the_curves_have() -> None:
    assert len(COLOURS) == NUM_COLOURS and f"const COLOURS = {NUM_COLOURS};" in asset("report.js")


ASK = """
<script>
addEventListener("load", () => {
  document.querySelector('.axes [data-axis="supervised_bytes"]').click();
  const svg = [...document.querySelectorAll('svg[data-key="ce"]')].find(
    one => getComputedStyle(one).display !== "none");
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: box.right - 20, clientY: box.top + 20}));
  document.title = svg.dataset.axis + "|" + document.getElementById("tip").innerText.replaceAll(/\\s+/g, " ");
  document.querySelector('.legend [data-run="0"]').click();
  document.title += "|" + document.querySelectorAll(".curve.off").length + "|" +
    (document.documentElement.scrollWidth <= innerWidth);
});
</script></body>"""


def test_a_browser_shows_values_hides_runs_and_changes_the_axis(browser: str, tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, 0.1) for name in ("one", "two")]
    text = page_of(*folders)
    shown = tmp_path / "page.html"
    shown.write_text(text, encoding="utf-8")
    _, complaints = open_page(browser, shown, "", tmp_path / "profile")
    assert not complaints
    # A user's clicks, made by a script that the page's own policy would refuse.
    shown.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", ASK))
    done, complaints = open_page(browser, shown, "", tmp_path / "profile")
    [title] = re.findall("<title>(.*?)</title>", done)
    axis, tip, off, fits = title.split("|")
    assert not complaints
    assert (axis, tip) == ("supervised_bytes", "supervised bytes 2,000 one 1 two 1")
    assert int(off) == 6 * 3 and fits == "true"
