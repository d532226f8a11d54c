"""Results written into the Markdown pages.

    make results        (.venv/bin/python -m tests.bench.pages)

A page asks for a table by a comment, and what stands from there to `<!-- end of results -->` is written anew:

    <!-- results: NAME.PART -->                the rows PART of tests/bench/results/NAME.json
    <!-- results: NAME -->                     how they were made: command, date, commit, machine, how many documents
    <!-- results: NAME.PART | columns: METHOD; JSD, nats | rows: sft; alm | digits: 3 -->     some of them, rounded

`columns` are headings, `rows` first cells; a column has as many decimals as its most precise number (each cell as its
own in a column `value`), at most `digits`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from os.path import relpath
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from tests.bench import results

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
END = "<!-- end of results -->"
MIXED = ("value", "beside", "number", "taken")  # columns of unlike things, each with its own decimals
_BLOCK = re.compile(rf"(<!-- results: ([^\n]+?) -->\n)(.*?)({re.escape(END)})", re.DOTALL)
_OPTIONS = ("columns", "rows", "digits")


class Request(NamedTuple):
    """Request of a page: a file's rows `part`, or how they were made if `part` is empty."""

    name: str
    part: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, text: str) -> "Request":
        """Read what stands in a comment. Raises ValueError for an unknown option."""
        what, *rest = (part.strip() for part in text.split(" | "))
        options = dict(tuple(map(str.strip, option.split(":", 1))) for option in rest)
        if unknown := set(options) - set(_OPTIONS):
            raise ValueError(f"unknown option {', '.join(unknown)} of results: {text}; there are {', '.join(_OPTIONS)}")
        name, _, part = what.partition(".")
        return cls(name, part, options)

    def written(self, page: Path, folder: Path = results.FOLDER) -> str:
        """Return what belongs between the comments. Raises ValueError if the figures asked for are not there."""
        result = results.read(self.name, folder)
        if not self.part:
            return origin(result, f"[{self.name}.json]({relpath(folder, page.parent)}/{self.name}.json)")
        rows = result.figures.get(self.part)
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{self.name}.json has no rows {self.part!r}; it has {', '.join(result.figures)}")
        columns = headings(rows)
        if wanted := _listed(self.options.get("rows", "")):
            rows = [_one(rows, columns[0], first, self.name) for first in wanted]
        if chosen := _listed(self.options.get("columns", "")):
            if missing := set(chosen) - set(columns):
                raise ValueError(f"{self.name}.json has no column {', '.join(missing)}; it has {'; '.join(columns)}")
            columns = chosen
        return table(rows, columns, int(self.options["digits"]) if "digits" in self.options else None)


def pages() -> list[Path]:
    """List the Markdown pages of the project."""
    of_packages = [page for package in PACKAGES for page in sorted((ROOT / package).rglob("*.md"))]
    bench = ROOT / "tests/bench"
    return [ROOT / "README.md", *of_packages, bench / "README.md", *sorted((bench / "pages").glob("*.md"))]


def requests(text: str) -> Iterator[Request]:
    """Yield what a page asks for."""
    yield from (Request.of(found[1]) for found in _BLOCK.findall(text))


def rewritten(page: Path, folder: Path = results.FOLDER) -> str:
    """Return a page with its results written anew."""
    text = page.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda found: found[1] + Request.of(found[2]).written(page, folder) + "\n" + found[4], text)


def origin(result: results.Result, link: str) -> str:
    """Return the paragraph that says how figures were made; `link` leads to them."""
    command = [f"`{result.command}`"] if result.command else []
    seeds = [] if result.seeds is None else ["one seed" if result.seeds == 1 else f"{result.seeds} seeds"]
    parts = [result.machine, result.documents, *seeds]
    when = [str(part) for part in (result.date, result.commit and f"commit {result.commit}") if part]
    said = "; ".join(part for part in (*parts, ", ".join(when)) if part)
    told = fill(f"{link}: {said}. {result.remark or ''}".strip(), 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*command, told])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int | None = None) -> str:
    """Return rows as a Markdown table."""
    lines = [_line(columns), _line(["---"] * len(columns))]
    most = {heading: _decimals([row.get(heading) for row in rows]) for heading in columns if heading not in MIXED}
    for row in rows:
        decimals = {heading: most.get(heading, _decimals([row.get(heading)])) for heading in columns}
        if digits is not None:
            decimals = {heading: min(digits, number) for heading, number in decimals.items()}
        lines.append(_line([cell(row.get(heading), decimals[heading]) for heading in columns]))
    return "\n".join(lines)


def headings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the headings of rows, in the order in which they first appear."""
    return list(dict.fromkeys(heading for row in rows for heading in row))


def cell(value: Any, decimals: int, sign: str = "") -> str:
    """Return a cell as text; `sign` is `+` for differences."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(cell(one, decimals, sign) or "?" for one in value)
    if isinstance(value, dict):
        sign = "+" if "difference" in value else sign
        inside = [cell(value[key], decimals, sign) for key in ("difference", "beside") if key in value]
        inside += [f"[{cell(value['interval'], decimals, sign)}]"] if "interval" in value else []
        error = [f"± {cell(value['error'], decimals)}"] if "error" in value else []
        bracketed = f"({' '.join(inside)})" if len(inside) > 1 or not inside or inside[0][0] != "[" else inside[0]
        return " ".join([cell(value["value"], decimals), *error, *([bracketed] if inside else [])])
    return f"{value:{sign},.{decimals}f}"


def numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of a cell, a row or whatever holds some."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def _decimals(cells: Sequence[Any]) -> int:
    exponents = [Decimal(str(number)).normalize().as_tuple().exponent for number in numbers(list(cells))]
    return max([0, *(-exponent for exponent in exponents if isinstance(exponent, int))])


def _one(rows: Sequence[Mapping[str, Any]], heading: str, first: str, name: str) -> Mapping[str, Any]:
    found = [row for row in rows if row.get(heading) == first]
    if len(found) != 1:
        raise ValueError(f"{name}.json has {len(found)} rows whose {heading!r} is {first!r}, not one")
    return found[0]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def show(
    rows: Sequence[Mapping[str, Any]],
    save: str = "",
    part: str = "rows",
    folder: Path = results.FOLDER,
    **about: str | int | None,
) -> None:
    """Print rows as a table and, if `save` names a file of results, keep them there.

    What another command kept in that file is gone. `about` is that of `results.save`.
    """
    print(table(rows, headings(rows)), flush=True)
    if save:
        file = folder / f"{save}.json"
        ours = file.exists() and results.read(save, folder).command == results.command()
        results.save(save, {**(results.load(save, folder) if ours else {}), part: list(rows)}, folder, **about)


def main() -> None:
    """Write the results into every page, and name those that changed."""
    for page in pages():
        if (anew := rewritten(page)) != page.read_text(encoding="utf-8"):
            page.write_text(anew, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
