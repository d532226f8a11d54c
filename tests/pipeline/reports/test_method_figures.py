"""The figures by method show the runs' own numbers where they belong: points, intervals over seeds, start, teacher."""

import json
import math
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student_t

from pipeline.reports.page import page
from pipeline.reports.runs import read_run, short_names
from schemas.manifest import write_json

START, TEACHER = 1.24, 1.09
BITS = {  # by method, steps and seed
    ("sft", 20): [1.193],
    ("sft", 40): [1.202, 1.200, 1.207],
    ("kl", 40): [1.178, 1.181],
    ("kl", 400): [1.157],
}


def make_runs(folder: Path) -> list[Path]:
    made = []
    for (method, steps), values in BITS.items():
        for seed, bits in enumerate(values):
            run = folder / f"{method}-{steps}-s{seed}"
            run.mkdir()
            (run / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 1.0}) + "\n")
            train = {"steps": steps, "seed": seed, "objectives": {"kl": float(method == "kl")}}
            write_json(run / "recipe.yaml", {"train": train, "student": {"path": str(run)}})
            write_json(run / "identity.json", {"train": train, "trained_on": [{"steps": steps}]})
            write_json(run / "eval.json", evaluated(bits))
            made.append(run)
    return made


def evaluated(bits: float, text: str = "a") -> dict[str, Any]:
    figures = {"start": START, "student": bits, "teacher": TEACHER}
    return {model: {"news": {"bits_per_byte": value, "text_sha256": text}} for model, value in figures.items()}


def page_of(folders: list[Path]) -> str:
    return page([read_run(folder) for folder in folders], short_names(folders))


def drawing(text: str) -> ET.Element:
    [svg] = re.findall(r"<svg[^>]*by method.*?</svg>", text, re.DOTALL)
    return ET.fromstring(svg)


class Axes:
    """The values of a drawing's coordinates."""

    def __init__(self, svg: ET.Element) -> None:
        self.frame, self.x, self.y = (
            [float(number) for number in svg.attrib[f"data-{name}"].split()] for name in ("frame", "x", "y")
        )

    def steps(self, at: float) -> float:
        left, right = self.frame[:2]
        return self.x[0] + (self.x[1] - self.x[0]) * (at - left) / (right - left)

    def value(self, at: float) -> float:
        bottom, top = self.frame[2:]
        return self.y[0] + (self.y[1] - self.y[0]) * (at - bottom) / (top - bottom)


def test_each_method_stands_at_its_steps_and_bits_with_the_interval_over_its_seeds(tmp_path: Path) -> None:
    svg = drawing(page_of(make_runs(tmp_path)))
    axes = Axes(svg)
    methods = [node for node in svg if node.attrib.get("class", "").startswith("method")]
    assert len(methods) == 2
    for node, name in zip(methods, ("sft", "kl"), strict=True):
        wanted = {steps: values for (method, steps), values in BITS.items() if method == name}
        start, *points = node.findall("circle")
        assert start.attrib["class"] == "start" and axes.steps(float(start.attrib["cx"])) == pytest.approx(0, abs=0.5)
        assert axes.value(float(start.attrib["cy"])) == pytest.approx(START, abs=1e-3)
        bars = [bar.attrib["d"] for bar in node.findall("path") if bar.attrib.get("class") == "bar"]
        for point, (steps, values) in zip(points, wanted.items(), strict=True):
            mean = statistics.fmean(values)
            assert axes.steps(float(point.attrib["cx"])) == pytest.approx(steps, abs=0.5)
            assert axes.value(float(point.attrib["cy"])) == pytest.approx(mean, abs=1e-3)
            told = point.findtext("title") or ""
            assert told.startswith(f"{name}, {steps} steps: {mean:.4f}")
            assert told.endswith(f", {mean - TEACHER:.4f} from the teacher")
            if len(values) == 1:
                assert "[" not in told
                continue
            half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
            low, high = (float(bound) for bound in re.findall(r"\[(.*), (.*)\]", told)[0])
            assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01 * half + 1e-4)
            drawn = re.match(r"M\S+ (\S+)V([\d.-]+)", bars.pop(0))
            assert drawn is not None
            assert [axes.value(float(end)) for end in drawn.groups()] == pytest.approx([low, high], abs=1e-3)
        assert not bars
    [teacher] = [node for node in svg if node.attrib.get("class") == "teacher"]
    height = float(teacher.find("path").attrib["d"].split()[1].split("H")[0])  # type: ignore[union-attr]
    assert axes.value(height) == pytest.approx(TEACHER, abs=1e-3)


def test_runs_of_one_seed_are_no_sample_and_runs_on_other_text_are_not_drawn(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    for run in runs:
        for name in ("recipe.yaml", "identity.json"):
            values = json.loads((run / name).read_text())
            write_json(run / name, values | {"train": values["train"] | {"seed": 7}})
    svg = drawing(page_of(runs))
    told = [title.text or "" for title in svg.iter("title")]
    assert any("mean of 3 runs" in text for text in told) and not any("[" in text for text in told)
    write_json(runs[0] / "eval.json", evaluated(1.3, "b"))
    assert "by method" not in page_of(runs) and "by method" not in page_of(runs[1:2])
    write_json(runs[1] / "eval.json", {"student": {"news": {"bits_per_byte": 1.2, "text_sha256": "a"}}})
    alone = drawing(page_of(runs[1:2] + runs[4:5]))
    assert sum(node.attrib.get("class") == "start" for node in alone.iter()) == 1
