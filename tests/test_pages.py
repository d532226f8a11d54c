"""The Markdown pages: their links lead somewhere, what they name exists, and messages they quote are in the code."""

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from pipeline.cli import app
from pipeline.config import Recipe
from pipeline.config.loading import parse_recipe
from pipeline.dumps.positions import Position
from pipeline.dumps.terminal import table
from schemas.columns import MEASURES
from tests.bench import pages, results
from tests.test_layout import ORDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = pages.pages()
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
MAX_LINES = 100  # of a page of results: two screens
SUFFIXES = ("json", "yaml", "py", "md", "jsonl")
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
OPERATING = ROOT / "pipeline/operating.md"
GAP = "\0"  # stands for a value in a message


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


def test_the_recipe_that_the_operator_is_shown_is_one() -> None:
    [text] = re.findall(r"```yaml\n(corpus:.*?)```", OPERATING.read_text(encoding="utf-8"), re.DOTALL)[:1]
    recipe = parse_recipe(text, OPERATING.name)
    assert recipe.student is not None and recipe.eval is not None
    assert len(text.splitlines()) <= 10


def texts(path: Path) -> Iterator[str]:
    """Yield the texts in a module as they are said, docstrings left out; a gap is where a value stands in them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_messages_that_the_operator_is_explained_are_those_that_the_code_says() -> None:
    rows = OPERATING.read_text(encoding="utf-8").split("## 9. Troubleshooting")[1].split("\n## ")[0]
    said = [text for package in PACKAGES for path in (ROOT / package).rglob("*.py") for text in texts(path)]
    quoted = {
        message
        for row in rows.splitlines()
        for message in re.findall(r'"([^"]+)"', row.partition("|")[2].partition("|")[0])
    }
    assert len(quoted) >= 30
    for message in quoted - {"operator torchvision::nms does not exist"}:  # torch says it
        parts = [re.escape(part.strip()) for part in re.split(r"\bN\b|…", message)]  # a value stands there in the code
        assert any(re.search(".*".join(parts), text, re.DOTALL) for text in said), message


def test_the_first_screen_of_the_readme_is_one_and_leads_to_the_other_readers() -> None:
    screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert len(screen.splitlines()) <= 60
    assert "\nmake demo\n" in screen
    for page in ("pipeline/operating.md", "stage2_student/method.md", "pipeline/architecture.md"):
        assert f"]({page})" in screen, page


def test_the_dump_that_the_readme_shows_looks_as_bld_inspect_shows_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("$ bld inspect")[1].split("\n```")[0]
    _, _, header, *lines = text.splitlines()
    found = []
    for offset, byte, bits, tail, *others in map(str.split, lines):
        measures = dict(zip((column.name for column in MEASURES), map(float, others), strict=False))
        entries = others[len(measures) :]
        symbols = [(ord(symbol), float(share)) for symbol, share in zip(entries[::2], entries[1::2], strict=True)]
        found.append(
            Position(int(offset), ord(byte), False, None, None, symbols, float(tail), measures, float(bits), 0.0)
        )
    assert [line.plain for line in table(found, 3)] == [header, *lines]


@cache
def names_in(module: Path) -> frozenset[str]:
    """Return the names that a module defines or imports, a class's members after its name and a point."""
    found: set[str] = set()

    def add(body: Sequence[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(before + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{before}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(before + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(before + node.target.id)
            elif isinstance(node, ast.ImportFrom):
                found.update(before + (alias.asname or alias.name) for alias in node.names)

    add(ast.parse(module.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def dotted_exists(name: str) -> bool:
    """Tell if `package.module.Class.member`, or any part of it from the left, is there."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:number])
        rest = ".".join(parts[number:])
        if path.is_dir() and not rest:
            return True
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module.exists():
            return not rest or rest in names_in(module)
    return False


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_functions_files_and_targets_that_a_page_names_exist(page: Path) -> None:
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    packages = "|".join((*PACKAGES, "tests"))
    for found in code(page.read_text(encoding="utf-8")):
        for name in re.findall(rf"(?<![\w./-])((?:{packages})(?:\.\w+)+)(?![\w/])", found):
            assert name.rpartition(".")[2] in SUFFIXES or dotted_exists(name), name
        for path in re.findall(rf"(?<![\w./-])((?:{packages}|\.ci)/[\w./*-]+)", found):
            assert list(ROOT.glob(path.replace("NAME", "*").rstrip("./"))), path
        for target in re.findall(r"(?:^|[ `])make ([a-z-]+)", found):
            assert target in made, found


def test_the_engineers_page_has_every_folder() -> None:
    text = (ROOT / "pipeline/architecture.md").read_text(encoding="utf-8").split("## 1. ")[1].split("\n## ")[0]
    shown = {part for found in code(text) for part in re.split(r"\W+", found)}
    assert not {name.rpartition(".")[2] for name in ORDER} - shown


def test_arrays_that_the_engineers_page_names_with_their_axes_are_in_the_code() -> None:
    sources = "\n".join(p.read_text(encoding="utf-8") for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
    shown = " ".join(code((ROOT / "pipeline/architecture.md").read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w.])[a-z][a-z_0-9]*_[A-Z][A-Z0-9]*(?!\w)", shown))
    assert len(named) >= 20
    assert not {name for name in named if not re.search(rf"\b{name}\b", sources)}


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
