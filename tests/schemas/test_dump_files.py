"""A dump's file names and its shards' keys stand in one module only."""

import ast
import re
from pathlib import Path

import pytest

from schemas import dump_files
from schemas.dump_files import Key

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
FILES = {
    dump_files.MANIFEST,
    dump_files.SUMMARY,
    dump_files.AUDIT,
    dump_files.INPUTS,
    dump_files.PLACES,
    dump_files.RECIPE,
    dump_files.VOCABULARY,
    dump_files.LOCK,
}
FOLDERS = {dump_files.SHARDS, dump_files.COSTS, dump_files.LEASES}


def literals(tree: ast.Module) -> list[str]:
    """Return a module's literals, docstrings and messages apart, in which dump files and keys may be named."""
    paths = {id(node.right) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)}
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        value = node.value.decode("latin-1") if isinstance(node.value, bytes) else str(node.value)
        if (
            value in FILES
            or re.search(r"\bbld\.[a-z]", value)
            or re.match(r"part-|(shards|costs|claims)/", value)
            or (id(node) in paths and value in FOLDERS)
        ):
            found.append(value)
    return found


def test_no_other_module_spells_a_file_or_a_key_of_a_dump() -> None:
    spelled = {
        str(path.relative_to(ROOT)): found
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / "schemas/dump_files.py" and (found := literals(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not spelled


def test_literals_are_found_where_there_are_any() -> None:
    code = "'Reads manifest.json.'\nread(dump / 'manifest.json', dump / 'shards', b'bld.engine', f'part-{3}', 'shards')"
    assert len(literals(ast.parse(code))) == 4


def test_the_specification_names_every_file_and_key() -> None:
    text = (ROOT / "schemas/README.md").read_text(encoding="utf-8")
    names = [*FILES, dump_files.CARD, f"{dump_files.SHARDS}/{dump_files.shard_name(3)}", f"{dump_files.LEASES}/"]
    names += [f"{dump_files.COSTS}/{dump_files.part_name(3)}.json", *(key for key in Key if key != Key.COUNTED_OF)]
    assert not [name for name in names if f"`{name}`" not in text]


@pytest.mark.parametrize("index", [0, 7, 99_999, 123_456])
def test_a_part_is_known_by_its_name(index: int) -> None:
    for name in (dump_files.shard_name(index), f"{dump_files.part_name(index)}.host-4711.partial"):
        assert dump_files.part_index(name) == index
    assert dump_files.shard_name(3) == "part-00003.parquet"
