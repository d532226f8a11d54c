"""The table of a shard's columns agrees with the specification, the record and the modules that use it."""

import ast
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.covering.targets import Targets
from schemas import SCHEMA_VERSION
from schemas.columns import BY_NAME, COLUMNS, MEASURES, Axis, Column, Mixing, Unit, shard_schema, units
from schemas.record import Record, common_measures
from schemas.record_checks import layout_faults
from schemas.token_alternatives import COLUMNS as TOKEN_COLUMNS
from stage2_student.data.align import aligned
from stage2_student.data.examples import Encoded, Example, Masks, make_example
from stage2_student.data.micro_batch import collate, empty_micro_batch
from stage2_student.data.mix import Mix
from tests.schemas.make_golden import FOLDER
from tests.support.small_dumps import make_record

ROOT = Path(__file__).resolve().parents[2]
MASKS = Masks(max_doubt=1.0, max_token_end=1.0)


def record(text: bytes, **changed: Any) -> Record:
    return replace(make_record("d", text, np.random.default_rng(len(text))), **changed)


def specified(column: Column) -> str:
    """Return the row that the specification must have."""
    kind = {"float": "float32"}.get(str(column.kind), str(column.kind))
    kind = f"list\\<{kind}\\>" if column.is_list else kind
    where = "" if column.stored_where is None else f"; only where the identity has `{column.stored_where}`"
    return f"| `{column.name}` | {kind} | {column.axis.value} | {column.meaning}{column.detail}{where} |"


def test_the_specification_has_the_table_row_by_row() -> None:
    text = (ROOT / "schemas/README.md").read_text(encoding="utf-8").split("## Columns")[1].split("## Reading")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    newest = [column for column in COLUMNS if column.is_in(SCHEMA_VERSION)]
    older = [column for column in COLUMNS if not column.is_in(SCHEMA_VERSION)]
    assert rows == [specified(column) for column in (*newest, *older)]


def test_files_say_of_their_columns_and_units_what_the_first_release_said() -> None:
    released = pq.read_schema(FOLDER / "version-1.parquet")
    said = {field.name: (field.metadata or {})[b"description"] for field in shard_schema({}, version=1)}
    for field in released:  # of chats more was said later
        assert said[field.name].startswith((field.metadata or {})[b"description"])
    assert units({}, version=1).encode() == (released.metadata or {})[b"bld.units"]


def test_a_record_has_a_field_for_every_column() -> None:
    held = {"segments": {c.name for c in COLUMNS if c.axis is Axis.SEGMENT}, "tokens": set(TOKEN_COLUMNS)}
    names = {name for field in fields(Record) for name in held.get(field.name, {field.name})}
    assert names == set(BY_NAME)


def test_targets_compute_every_measure() -> None:
    has = {field.name for field in fields(Targets)} | set(vars(Targets))
    assert {f"{column.name}_P" for column in MEASURES} <= has


def test_the_table_can_be_shown_and_stored() -> None:
    assert all(column.heading and len(column.heading) <= 7 for column in MEASURES)
    assert not [c.name for c in MEASURES if c.mixed is Mixing.NONE and c.stored_where is None]
    assert not [c.name for c in MEASURES if c.kind != pa.float32()]


def names_in(path: Path) -> set[str]:
    """Return attributes, names and literals of a module, docstrings apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword):
            found.add(str(node.arg))
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            found |= set(re.findall(r"\w+", str(node.value))) if len(str(node.value)) < 40 else set()
    return found


def test_no_module_but_the_table_and_what_computes_them_lists_the_measures() -> None:
    wanted = {column.name for column in MEASURES}
    listing = [
        str(path.relative_to(ROOT))
        for package in ("pipeline", "stage1_teacher", "stage2_student")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.parent.name != "covering" and wanted <= names_in(path)
    ]
    assert not listing


@pytest.mark.parametrize(
    ("identity", "stored"),
    [({}, False), ({"corpus": {}}, False), ({"corpus": {"turns": "rendered"}}, True), ({"corpus": 3}, False)],
)
def test_a_column_is_there_where_the_identity_says_so(identity: dict[str, object], stored: bool) -> None:
    assert ("conversation" in shard_schema(identity).names) is stored


def test_numbers_are_stored_as_they_are_or_at_levels() -> None:
    shares = np.array([0.0, 0.0004, 0.011, 1.0])
    assert BY_NAME["doubt"].as_stored(shares, exact=True).tolist() == shares.astype(np.float32).tolist()
    assert BY_NAME["doubt"].as_stored(shares, exact=False) == pytest.approx([0, 0, 0.02, 1])
    assert Unit.SHARE.bounds == (0, 1) and Unit.NATS.bounds == (0, np.inf)


def test_a_measure_of_another_length_is_a_fault_and_one_that_is_not_stored_is_none() -> None:
    whole = record(b"river")
    assert "position columns" in layout_faults(replace(whole, doubt=whole.doubt[1:]))[0]
    lacking = record(b"river", doubt=None)
    assert not layout_faults(lacking) and "doubt" not in lacking.measures
    found = common_measures([whole, lacking])
    assert found["doubt"] is None and found["dropped"] is not None


def test_a_measure_that_one_dump_lacks_is_neither_aligned_nor_mixed() -> None:
    whole = record(b"stone ran")
    lacking = record(b"stone ran", doubt=None)
    ours, theirs = aligned(whole, [[lacking]])
    assert ours.doubt.tolist() == whole.doubt.tolist() and theirs.doubt is None
    mixed = Mix.of([1, 3], "arithmetic")([ours, replace(theirs, token_end=ours.token_end * 0)])
    assert mixed.doubt is None and mixed.token_end == pytest.approx(whole.token_end / 4)


def example(text: bytes) -> Example:
    ends = np.arange(1, len(text) + 1)
    tokens = np.zeros(len(text), np.int64)
    return make_example(Encoded(record(text), tokens, ends - 1, ends), 0, 0, None, MASKS)


def test_objectives_are_given_the_measures_of_each_position() -> None:
    one, other = record(b"thing"), record(b"under 7")
    micro = collate([example(b"thing"), example(b"under 7")])
    assert set(micro.measures_P) == set(one.measures)
    assert micro.measures_P["token_end"].tolist() == [*one.token_end, *other.token_end]
    assert all(values.shape == micro.kl_P.shape for values in micro.measures_P.values())


def test_a_batch_without_positions_has_every_measure_and_one_that_a_document_lacks_is_left_out() -> None:
    empty = empty_micro_batch(0).measures_P
    assert {name for name, values in empty.items() if not len(values)} == {column.name for column in MEASURES}
    bare = replace(example(b"thing"), measures_P={})
    assert not collate([example(b"under 7"), bare]).measures_P
