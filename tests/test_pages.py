"""The Markdown pages: their links lead somewhere, what they name exists, and messages they quote are in the code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from pipeline.cli import app
from pipeline.config import Recipe
from pipeline.config.loading import parse_recipe
from tests.bench import pages, results

ROOT = Path(__file__).resolve().parents[1]
PAGES = pages.pages()
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
MAX_LINES = 100  # of a page of results: two screens
SUFFIXES = ("json", "yaml", "py", "md", "jsonl")
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")


def anchors(page: Path) -> set[str]:
    """Return the anchors of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def key_exists(model: Any, names: list[str]) -> bool:
    """Tell if `a.b.c` is a key of a recipe; anything below a free mapping is one."""
    if not names:
        return True
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return any(key_exists(inner, names) for inner in get_args(model))
    return names[0] in model.model_fields and (
        len(names) == 1 or key_exists(model.model_fields[names[0]].annotation, names[1:])
    )


def code(text: str) -> Iterator[str]:
    """Yield what stands in backquotes, blocks included."""
    yield from re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    yield from re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_links_to_and_shows_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert "://" in link or target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_command_to_be_pasted_stands_on_one_line(page: Path) -> None:
    outside = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = [
        text
        for text in re.findall(r"`([^`]+)`", outside)
        if re.match(r"(make|bld|\.venv/bin/\S+) ", text) and "\n" in text
    ]
    assert not broken  # make takes what follows a line's end inside ARGS for a command of its own


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_recipe_keys_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    sections = "|".join(Recipe.model_fields)
    options = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    for found in code(page.read_text(encoding="utf-8")):
        for section, rest in re.findall(rf"(?<![\w./-])({sections})\.([a-z_]+(?:\.[a-z_]+)*)(?![\w/(])", found):
            names = [section, *rest.split(".")]
            if page.parent.name == "schemas":  # it speaks of a manifest's keys
                continue
            assert names[-1] in SUFFIXES or key_exists(Recipe, names), (names, found)
        for command, rest in re.findall(r"(?:^|[ /])bld ([a-z]+)([^`\n#|&]*)", found):
            assert command in options, found
            assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", rest)) <= options[command] | {"-q", "-v"}, found


def test_the_recipe_that_the_readme_shows_is_one() -> None:
    [text] = re.findall(r"```yaml\n(corpus:.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    recipe = parse_recipe(text, "README.md")
    assert recipe.student is not None and recipe.eval is not None


def test_the_messages_that_the_readme_explains_are_those_that_the_code_says() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Troubleshooting")[1].split("\n## ")[0]
    sources = [p.read_text(encoding="utf-8") for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    quoted = {
        message
        for row in table.splitlines()
        for message in re.findall(r'"([^"]+)"', row.partition("|")[2].partition("|")[0])
    }
    assert len(quoted) >= 10
    for message in quoted - {"operator torchvision::nms does not exist"}:  # torch says it
        parts = re.split(r"\b[NM3]\b", message)  # a number there, a value in the code
        assert any(all(part.strip(" ") in source for part in parts) for source in sources), message


def prose(text: str) -> str:
    """Return a page without what is no figure of its prose: results, commands, code, links, headings, versions."""
    text = re.sub(r"<!-- results: .*?<!-- end of results -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^#.*$", " ", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(
        r"(arXiv|torch|transformers|vLLM|genlm-bytes|lm-evaluation-harness) [\d.:]+|95 %\s+interval", "", text
    )


def figures_in(text: str) -> Iterator[tuple[str, float, int]]:
    """Yield figures in a text: numbers with a decimal point or before `%`, each with its value and decimals."""
    for found in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\d.])(?: ?%)?", text):
        value = found.rstrip(" %").replace(",", "")
        if "." in value or found.endswith("%"):
            yield found, float(value), len(value.partition(".")[2])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_shows_of_results_is_what_their_files_say(page: Path) -> None:
    assert pages.rewritten(page) == page.read_text(encoding="utf-8"), "run `make results`"


RESULT_PAGES = [page for page in PAGES if page.parent.name == "pages"]


@pytest.mark.parametrize("page", RESULT_PAGES, ids=[page.name for page in RESULT_PAGES])
def test_a_figure_in_the_prose_of_a_page_is_in_a_file_that_the_page_shows(page: Path) -> None:
    check_figures(page.read_text(encoding="utf-8"))


def test_a_figure_in_the_results_of_the_readme_is_in_a_file_that_they_show() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Results")[1].split("\n## ")[0]
    check_figures(text)


def check_figures(text: str, names: set[str] | None = None) -> None:
    """Assert that each figure in the prose of a text is, rounded as it is, in a file of results (those it names)."""
    names = names or {request.name for request in pages.requests(text)} | set(
        re.findall(r"results/([\w-]+)\.json", text)
    )
    known = set()
    for name in names:
        values = results.read(name).model_dump(mode="json")
        known |= {abs(number) for number in pages.numbers(values["figures"])}
        known |= {float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", str(values))}
    wrong = [
        said
        for said, value, decimals in figures_in(prose(text))
        if not any(abs(number - value) <= 0.5001 * 10**-decimals for number in known)
    ]
    assert not wrong, f"in no file that this page shows ({', '.join(sorted(names))}): {wrong}"


@pytest.mark.parametrize("page", RESULT_PAGES, ids=[page.name for page in RESULT_PAGES])
def test_a_page_of_results_is_no_longer_than_two_screens(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert sum(not line.startswith("<!-- ") for line in lines) <= MAX_LINES
