"""Figures of benchmarks: their files are read, rendered and held against pages and code."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DeepSpeedConfig, Recipe
from stage2_student.launch.memory_estimate import Sizes, bucket_bytes, state_bytes
from tests.bench import pages, results
from tests.test_pages import check_figures, key_exists

NAMES = sorted(file.stem for file in results.FOLDER.glob("*.json"))


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a result, headings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from (key, *strings(one))
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def options(module: Path) -> set[str]:
    """Return the options that a benchmark's `main` takes, as typer makes them."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    named = {f"--{parameter.arg.replace('_', '-')}" for parameter in main.args.args}
    declared = {node.value for node in ast.walk(main) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return named | {f"--no-{name[2:]}" for name in named} | {text for text in declared if text.startswith("-")}


def benchmarks(command: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the benchmarks that a command runs, each with its arguments."""
    words = shlex.split(command)
    given = {name: value for name, _, value in (word.partition("=") for word in words) if name in ("BENCH", "ARGS")}
    if words[:2] == ["make", "bench"]:
        for name in given["BENCH"].split():
            yield name, shlex.split(given.get("ARGS", ""))
    elif words[:2] == ["make", "bench-quality"]:
        yield "quality", shlex.split(given.get("ARGS", ""))
    elif "-m" in words and words[words.index("-m") + 1].startswith("tests.bench."):
        module, *arguments = words[words.index("-m") + 1 :]
        yield module.removeprefix("tests.bench."), arguments


def overrides(arguments: list[str]) -> Iterator[str]:
    """Yield the recipe keys that arguments set."""
    texts = [*arguments, *(word for text in arguments if " " in text for word in text.replace(";", " ").split())]
    yield from (found[1] for text in texts if (found := re.match(r"([a-z]+\.[a-z_.]+)=", text)))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_result_is_one_that_the_code_still_takes(name: str) -> None:
    command = results.read(name).command
    if command is None:  # it is not known, or several made the figures
        return
    found = list(benchmarks(command))
    assert found or command.startswith(("bld ", "make ")), command
    for benchmark, arguments in found:
        module = results.FOLDER.parent / f"{benchmark}.py"
        assert module.exists(), command
        assert {word for word in arguments if re.match(r"--?[a-z]", word)} <= options(module), command
        for key in overrides(arguments):
            assert key_exists(Recipe, key.split(".")), (command, key)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_on_a_page(name: str) -> None:
    shown = [page for page in pages.pages() if re.search(rf"\b{name}\b", page.read_text(encoding="utf-8"))]
    assert shown, f"no page shows {name}.json: put `<!-- results: {name}.rows -->` where its table belongs"


def test_what_was_saved_is_read_again_with_how_it_was_made(tmp_path: Path) -> None:
    figures = {"rows": [{"method": "a", "bits": {"value": 1.5, "interval": [1.25, float("nan")]}}], "other": 3}
    results.save("one", figures, tmp_path, documents="12 documents", seeds=2)
    found = results.read("one", tmp_path)
    assert (
        results.load("one", tmp_path)
        == found.figures
        == {
            "rows": [{"method": "a", "bits": {"value": 1.5, "interval": [1.25, None]}}],
            "other": 3,
        }
    )
    assert (found.documents, found.seeds) == ("12 documents", 2) and found.command and found.date and found.machine
    assert '\n   {"method": "a"' in (tmp_path / "one.json").read_text(encoding="utf-8")  # a row a line
    assert results.load("another", tmp_path) == {}


def test_what_a_benchmark_shows_is_kept_without_what_another_command_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("first", "second"):
        pages.show([{"method": "a", "bits": 1.5}], "one", part, tmp_path, seeds=1)
    assert capsys.readouterr().out.splitlines()[2] == "| a | 1.5 |"
    kept = results.read("one", tmp_path)
    assert list(kept.figures) == ["first", "second"] and kept.seeds == 1
    results.write("one", kept.model_copy(update={"command": "another"}), tmp_path)
    pages.show([{"method": "a", "bits": 1.5}], "one", "third", tmp_path)
    assert list(results.load("one", tmp_path)) == ["third"]


@pytest.mark.parametrize("text", ["{", '{"command": "x"}', '{"figures": {}, "comand": "x"}'])
def test_a_file_that_holds_no_figures_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json is not a file of figures"):
        results.read("broken", tmp_path)


def test_a_cell_shows_all_that_is_known_of_its_value() -> None:
    assert pages.cell(1234567, 0) == "1,234,567"
    assert pages.cell(None, 2) == "" and pages.cell("as it is", 2) == "as it is"
    assert pages.cell([0.5, 1], 1) == "0.5, 1.0"
    assert pages.cell({"value": 69, "error": 5}, 0) == "69 ± 5"
    assert pages.cell({"value": 1.2, "beside": 0.25}, 2) == "1.20 (0.25)"
    assert pages.cell({"value": 1.2, "interval": [-1, 2]}, 1) == "1.2 [-1.0, 2.0]"
    assert pages.cell({"value": 1.2, "interval": [None, None]}, 1) == "1.2 [?, ?]"  # of too few documents
    value = {"value": 1.2, "difference": -0.0, "interval": [-0.01, 0.01]}
    assert pages.cell(value, 2) == "1.20 (-0.00 [-0.01, +0.01])"


def test_a_page_is_written_with_the_rows_columns_and_digits_that_it_asks_for(tmp_path: Path) -> None:
    rows = [{"method": "a", "bits, in": 1.23456}, {"method": "b", "bits, in": 2, "share, %": 50}]
    results.write(
        "made", results.Result(command="x", commit=None, date=None, machine="m", figures={"r": rows}), tmp_path
    )
    page = tmp_path / "page.md"

    def written(wanted: str) -> list[str]:
        page.write_text(f"before\n<!-- results: {wanted} -->\nold\n{pages.END}\nafter", encoding="utf-8")
        before, _, *inside, end, after = pages.rewritten(page, tmp_path).splitlines()
        assert (before, end, after) == ("before", pages.END, "after")
        return inside

    assert written("made.r")[0] == "| method | bits, in | share, % |"
    assert written("made.r")[2:] == ["| a | 1.23456 |  |", "| b | 2.00000 | 50 |"]
    chosen = written("made.r | columns: bits, in; method | rows: b; a | digits: 1")
    assert chosen == ["| bits, in | method |", "| --- | --- |", "| 2.0 | b |", "| 1.2 | a |"]
    assert written("made") == ["`x`", "[made.json](./made.json): m."]
    for wrong, said in (
        ("made.s", "no rows 's'; it has r"),
        ("made.r | rows: c", "0 rows"),
        ("made.r | digit: 1", "digit"),
    ):
        with pytest.raises(ValueError, match=said):
            written(wrong)


def test_a_line_of_what_was_no_better_has_its_figures_from_the_file_that_it_names() -> None:
    for row in results.read("no-better").figures["rows"]:
        [name] = re.findall(r"results/([\w-]+)\.json", row["file"])
        check_figures(row["result"], {name})


def value(cell: Any) -> float:
    return float(cell["value"] if isinstance(cell, dict) else cell)


WAY, BITS = "from start to teacher, %", "bits/byte out of domain"


@pytest.mark.parametrize("name", ["quality-searched", "quality-first-weights", "quality-400-steps", "pairs-20-steps"])
def test_the_way_from_start_to_teacher_is_that_of_the_bits_in_the_table(name: str) -> None:
    rows = results.read(name).figures["rows"]
    for row in rows:
        of_pair = [one for one in rows if one.get("student") == row.get("student")]
        start, teacher = (
            next(value(one[BITS]) for one in of_pair if one["method"].split()[0] == method)
            for method in ("start", "teacher")
        )
        if row[WAY] is not None:
            assert value(row[WAY]) == round(100 * (start - value(row[BITS])) / (start - teacher)), row


def test_the_headline_says_what_its_tables_say() -> None:
    figures = results.read("headline").figures
    known = {abs(number) for name in figures["from"] for number in pages.numbers(results.read(name).figures)}
    for row in figures["rows"]:
        assert known.issuperset(pages.numbers(row)), row
    [teacher], start = figures["teacher"], figures["rows"][0]["start"]
    known_bits = [start, *(row[BITS] for row in (figures["way"][0], figures["way"][-1])), teacher["value"]]
    assert [row[BITS] for row in figures["short"]] == known_bits
    for row in (*figures["way"], *figures["short"]):
        assert row["of the way, %"] == round(100 * (start - row[BITS]) / (start - teacher["value"])), row
    best, ours = figures["way"][0][BITS], figures["way"][-1][BITS]
    [left] = figures["left"][0].values()
    assert left == round(100 * (best - ours) / (best - teacher["value"]))
    assert best == min(number for number in pages.numbers(figures["rows"][0]))


def test_what_hardware_costs_is_what_the_other_files_and_the_code_say() -> None:
    figures = results.read("hardware").figures
    on_paper = {next(iter(row.values())): row for row in results.read("terabyte").figures["rows"]}
    [passages] = [row["taken"] for row in results.read("forecast").figures["rows"] if row["what"] == "teacher tokens"]
    small, on_gpu, *large = figures["teacher"]
    dump = results.read("dump-speed").figures["rows"][-3]
    assert dump["what, bfloat16"].startswith("the dump") and small["tokens/s"] == dump["tokens/s"]
    shares = {row["figure"]: row["value"] for row in results.read("quality-400-steps").figures["shares"]}
    seconds, _ = shares["s of the dump, in all and until the first worker had compiled"]
    assert on_gpu["tokens/s"] == round(450_000 / seconds, -2)
    for row in (small, on_gpu):
        bytes_a_token = float(re.findall(r"[\d.]+ bytes a token", small["from"])[0].split()[0])
        assert row["hours a GB of text"] == pytest.approx(1e9 / bytes_a_token / row["tokens/s"] / 3600, rel=0.01)
    assert passages == 51500  # teacher tokens of the demo's 219,899 bytes
    for row, size in zip(large, ("8B", "70B"), strict=True):
        assert row["tokens/s"] == float(on_paper["tokens a second on a GPU"][size].replace(",", ""))
        assert row["hours a GB of text"] == round(float(on_paper["GPU-hours"][size].replace(",", "")) / 1000, 1)
    for row in figures["student"]:
        first, *cells = row.values()
        weights = float(first.split()[0]) * 1e9
        for cell, (stage, ranks) in zip(cells, ((0, 1), (2, 8), (3, 8)), strict=True):
            bucket = bucket_bytes(DeepSpeedConfig()) if stage else 0
            expected = state_bytes(Sizes(int(weights), int(weights)), stage, ranks) + bucket
            assert cell == round(expected / 2**30, 1), row


def test_small_numbers_keep_their_digits_in_a_table() -> None:
    assert pages.table([{"x": 6.6e-5}, {"x": 7e-4}], ["x"]).splitlines()[2:] == ["| 0.000066 |", "| 0.000700 |"]


def test_json_of_a_result_is_what_the_layout_holds(tmp_path: Path) -> None:
    for name in NAMES:
        results.write(name, results.read(name), tmp_path)
        old, new = ((folder / f"{name}.json").read_text(encoding="utf-8") for folder in (results.FOLDER, tmp_path))
        assert json.loads(old) == json.loads(new), name
