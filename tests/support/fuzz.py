"""Damaged and crafted input at random: files of a corpus, recipes, shards, written text, vocabularies, manifests.

Bad input must be refused with an error message; never with a traceback of another kind, never with a silently wrong
value.

Each target draws what it does from a `Random`: of a seed, so that what was found can be seen again (`python -m
tests.bench.fuzz shard --first 812 --cases 1`), of hypothesis, which makes it shorter, or of a fuzzer that follows the
code's branches.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.config import CorpusConfig, Recipe
from pipeline.config.loading import parse_recipe, recipe_names
from pipeline.corpus.documents import Corpus
from pipeline.corpus.json_array import is_array
from schemas import dump_files
from schemas.file_seal import check_seal
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Segment
from schemas.record_checks import layout_faults
from schemas.shard import commit_shard, read_record_texts, read_shard, to_table
from schemas.text_corpus import TextManifest, WrittenText, commit_text_shard
from schemas.token_vocabulary import read_vocabulary, write_vocabulary
from tests.support.readable_dumps import IDENTITY, make_record, varied_record, with_tokens

PIECES = (
    b"\x00",
    b"\xff",
    b'"',
    b"\\",
    b"\\ud800",
    b"\\udc00x",
    b"{",
    b"[",
    b"}",
    b"\n",
    b"\r\n",
    b": ",
    b"NaN",
    b"1e999",
    b"null",
    b"true",
)
MARK = b"\xef\xbb\xbf"
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ROWS: tuple[dict[str, Any], ...] = (
    {"text": "one", "id": 1},
    {"text": "<|endoftext|> שלום e\u0301 \x00", "id": "a/../b"},
    {"text": "", "id": None},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "text": "t", "id": "x"},
)
VALUES = (
    "",
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    ".nan",
    "9" * 40,
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "'x'",
    "*a",
    "&a b",
    "!!int x",
    "2020-01-01",
    "~",
    "\t",
)


def mutated(content: bytes, rng: Random, most: int = 4) -> bytes:
    """Flip, insert, remove or double a few bytes."""
    found = bytearray(content)
    for _ in range(rng.randrange(most + 1)):
        at = rng.randrange(len(found) + 1)
        length = rng.randrange(1, 9)
        match rng.randrange(4):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                found[at:at] = rng.choice(PIECES)
            case 2:
                del found[at : at + length]
            case _:
                found[at:at] = found[at : at + length]
    return bytes(found)


class Written(NamedTuple):
    """A file of a corpus; `num_rows` counts its documents and faults, None if that is not known."""

    name: str
    content: bytes
    num_rows: int | None


def _json_lines(rng: Random) -> Written:
    rows = rng.choices(ROWS, k=rng.randrange(6))
    text = "".join(json.dumps(row, ensure_ascii=bool(rng.randrange(2))) + "\n" for row in rows)
    content = rng.choice((b"", b"", MARK)) + mutated(text.encode(), rng)
    lines = content.split(b"\n")
    told = not is_array(content)  # a first line that was made to look like one is read on from where it breaks
    return Written(rng.choice(("c.jsonl", "c.json")), content, len(lines) - (not lines[-1]) if told else None)


def _json_array(rng: Random) -> Written:
    rows: list[Any] = rng.choices([*ROWS, 5, [], "x"], k=rng.randrange(6))
    rows.insert(0, {"text": "first"})
    layout = rng.choice(({}, {"indent": 1}, {"separators": (",\n", ":")}))
    content = rng.choice((b"", MARK)) + json.dumps(rows, ensure_ascii=bool(rng.randrange(2)), **layout).encode()
    spoiled = mutated(content, rng) if rng.randrange(2) else content
    return Written(rng.choice(("c.jsonl", "c.json")), spoiled, len(rows) if spoiled == content else None)


def _text(rng: Random) -> Written:
    return Written("c.txt", rng.choice((b"", MARK)) + mutated(b"some text \xc3\xa9", rng), 1)


def _parquet(rng: Random) -> Written:
    rows = rng.choices(ROWS[:1], k=rng.choice((0, 0, 1, 5)))
    table = pa.table({"text": pa.array([row["text"] for row in rows], pa.string()), "id": pa.array([1] * len(rows))})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rng.choice((1, 100)))
    content = sink.getvalue()
    spoiled = mutated(content, rng) if rng.randrange(4) == 0 else content
    return Written("c.parquet", spoiled, len(rows) if spoiled == content else None)


def _packed(written: Written, rng: Random) -> Written:
    """Compress content, under a name that says so, or another one, or none."""
    suffix = rng.choice(list(COMPRESSORS))
    packed = COMPRESSORS[suffix](written.content)
    damaged = mutated(packed, rng) if suffix and rng.randrange(2) else packed
    name = written.name + rng.choice((suffix, suffix, *COMPRESSORS) if suffix else ("",))
    return Written(name, damaged, written.num_rows if damaged == packed else None)


def corpus(rng: Random, folder: Path) -> None:
    """Check that every row becomes a document or is counted, whatever files follow one another.

    Damaged content is refused, or reads as it was.
    """
    source = folder / "corpus"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    total: int | None = 0
    for place in range(rng.choice((1, 1, 2, 3))):
        written = rng.choice((_json_lines, _json_lines, _json_array, _text, _parquet))(rng)
        if not written.name.endswith(".parquet"):
            written = _packed(written, rng)
        (source / f"{place}-{written.name}").write_bytes(written.content)
        total = None if total is None or written.num_rows is None else total + written.num_rows
    keys: dict[str, Any] = {
        "field": rng.choice(("text", "text", "messages", "none")),
        "id_field": rng.choice((None, "id")),
        "max_row_bytes": rng.choice([8, 40, 10**6]),
    }
    found = Corpus(CorpusConfig(source=str(source), **keys))
    documents = list(found.documents())  # ValueError where there is none
    assert all(document.text and document.text.decode("utf-8") for document in documents)
    assert not any(document.text.startswith(MARK) for document in documents if document.doc_id == "0")
    assert all(document.doc_id.encode("utf-8") for document in documents)
    apart = [text for file in sorted(source.iterdir()) for text in _texts_of(file, keys)]
    assert [document.text for document in documents] == apart
    if total is not None:  # a flip in a header that the format does not check leaves the content as it is
        assert sum(n for key, n in found.counts.items() if key != "bytes") == total


def _texts_of(file: Path, keys: dict[str, Any]) -> list[bytes]:
    """Return a file's documents, read alone."""
    try:
        return [document.text for document in Corpus(CorpusConfig(source=str(file), **keys)).documents()]
    except ValueError as error:
        assert "yields no usable document" in str(error)
        return []


def recipe(rng: Random, folder: Path) -> None:
    """Check that a recipe that can be read can be written and read again."""
    names = recipe_names()
    base = "".join(f"# {name}\n" for name in names[:1]) + _recipe_text(rng.choice(names))
    if rng.randrange(2):
        lines = base.split("\n")
        at = rng.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(VALUES)
        base = "\n".join(lines)
    text = mutated(base.encode(), rng).decode("utf-8", errors="replace")
    found = parse_recipe(text, "fuzz.yaml", [f"train.steps={rng.choice(VALUES)}"] if rng.randrange(3) == 0 else [])
    assert Recipe.model_validate(found.model_dump(mode="json")) == found


def _recipe_text(name: str) -> str:
    from pipeline.config import loading as module

    return (Path(module.__file__).parents[1] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def shard(rng: Random, folder: Path) -> None:
    """Check that a damaged shard is refused by its seal.

    A crafted one, whose seal is right, is refused or consistent.
    """
    records = [make_record("a", b"some text"), varied_record("b", rng.randrange(2**32))]
    path = folder / "s.parquet"
    if rng.randrange(2):
        table = to_table([with_tokens(record) for record in records], IDENTITY | {"tokens": {"top_k": 4}})
    else:
        table = to_table(records, IDENTITY)
    if rng.randrange(2):
        commit_shard(_crafted(table, rng), path, 1)
        check_seal(path)
        assert not [fault for record in read_shard(path) for fault in layout_faults(record)]
        assert all(text.document is not None for text in read_record_texts(path))
        return
    commit_shard(table, path, 1)
    content = path.read_bytes()
    path.write_bytes(mutated(content, rng))
    if path.read_bytes() != content:
        check_seal(path)  # ValueError, or
        raise AssertionError("a seal that is right on a file that was changed")


def _crafted(table: pa.Table, rng: Random) -> pa.Table:
    """Change a value, length or type in one column, or remove a column."""
    index = rng.randrange(table.num_columns)
    field = table.schema.field(index)
    if rng.randrange(8) == 0:
        return table.remove_column(index)
    values = table.column(index).to_pylist()
    row = rng.randrange(len(values))
    if isinstance(values[row], list):
        values[row] = _crafted_list(values[row], field.type.value_type, rng)
    elif values[row] is None:
        values[row] = b"\xff"
    elif isinstance(values[row], int):
        values[row] = rng.choice([-1, 0, 2**40, -(2**63)])
    else:
        values[row] = values[row][: rng.randrange(3)]
    kind = pa.list_(pa.int64()) if field.name == "other_counts" and rng.randrange(4) == 0 else field.type
    return table.set_column(index, pa.field(field.name, kind, nullable=False), pa.array(values, type=kind))


def _crafted_list(values: list[Any], kind: pa.DataType, rng: Random) -> list[Any]:
    if not values or rng.randrange(3) == 0:
        return values[: rng.randrange(len(values) + 1)]
    at = rng.randrange(len(values))
    if pa.types.is_floating(kind):
        wrong: Any = rng.choice([math.nan, math.inf, -math.inf, 0.5, -0.1])
    elif pa.types.is_integer(kind):
        width = kind.bit_width - (not pa.types.is_unsigned_integer(kind))
        wrong = (
            rng.choice([0, 1, 2**width - 1])
            if pa.types.is_unsigned_integer(kind)
            else rng.choice([-1, 0, 2**width - 1])
        )
    elif pa.types.is_boolean(kind):
        wrong = not values[at]
    elif pa.types.is_struct(kind):
        wrong = values[at] | {rng.choice(sorted(values[at])): rng.choice(("", "[", "user"))}
    else:
        wrong = ""
    return [*values[:at], wrong, *values[at + 1 :]]


def written(rng: Random, folder: Path) -> None:
    """Check that a damaged corpus of `bld generate` is refused, or reads as it was.

    What a crafted one, whose checksums are right, says that a model wrote lies in the text, or the row is left out.
    """
    source = folder / "written"
    shutil.rmtree(source, ignore_errors=True)
    is_chat = bool(rng.randrange(2))
    rows = [written_row(number, is_chat, rng) for number in range(rng.randrange(1, 4))]
    plan = ShardPlan(0, 0, len(rows), 10, "0" * 64)
    (source / "shards").mkdir(parents=True)
    prompts = {"field": "messages"} if is_chat else {}
    TextManifest(identity={"prompts": prompts}, prompt_counts={}, shards=(plan,)).save(source)
    commit_text_shard(rows, plan.path(source), {}, {})
    config = CorpusConfig(source=str(source), field="messages" if is_chat else "text")
    whole = list(Corpus(config).documents())
    spoiled = rng.choice((plan.path(source), source / dump_files.TEXT_MANIFEST))
    if rng.randrange(2):
        table = pq.read_table(plan.path(source))
        pq.write_table(_crafted(table, rng), plan.path(source), write_page_checksum=True)
    else:
        content = spoiled.read_bytes()
        spoiled.write_bytes(mutated(content, rng))
        found = list(Corpus(config).documents())
        assert found == whole or spoiled.name == dump_files.TEXT_MANIFEST
        return
    for document in Corpus(config).documents():
        ends = [0]
        for segment in document.segments or ():
            assert ends[-1] <= segment.start <= segment.start + segment.length <= len(document.text)
            ends.append(segment.start + segment.length)
        assert all(turn in range(len(document.messages or ())) for turn in document.turns or ())


def written_row(number: int, is_chat: bool, rng: Random) -> WrittenText:
    """Make a row of a written corpus: a prompt and a completion of it."""
    prompt, completion = "a pr\u00f3mpt ", rng.choice(("wr\u00eftten", "x" * 20))
    has_end = bool(rng.randrange(2))
    start, length = len(prompt.encode()), len(completion.encode())
    return WrittenText(
        doc_id=f"{number}/0",
        text="" if is_chat else prompt + completion,
        segments=() if is_chat else (Segment(start, length, has_end),),
        messages=({"role": "user", "content": prompt}, {"role": "assistant", "content": completion}) if is_chat else (),
        tools="",
        supervised_messages=(1,) if is_chat else (),
        is_finished=has_end,
        prompt_id=str(number),
        completion=0,
        seed=number,
        num_tokens=3,
    )


def vocabulary(rng: Random, folder: Path) -> None:
    """Check that a damaged file of the teacher's tokens is refused, or reads as it was; a crafted one is refused."""
    spelled = [rng.choice((None, b"", b"a", b"\xff\x00", b"token" * 9)) for _ in range(rng.randrange(1, 40))]
    path = folder / dump_files.VOCABULARY
    path.unlink(missing_ok=True)
    write_vocabulary(folder, spelled)
    if rng.randrange(2):
        path.write_bytes(mutated(path.read_bytes(), rng))
        assert read_vocabulary(folder) == spelled
        return
    pq.write_table(_crafted(pq.read_table(path), rng), path)
    assert all(token is None or isinstance(token, bytes) for token in read_vocabulary(folder))


def manifest(rng: Random, folder: Path) -> None:
    """Check that a damaged manifest is refused, or names files of its dump alone, and can be written and read again."""
    plans = tuple(ShardPlan(i, i, 1, 5, "0" * 64, rng.choice(("", "00000"))) for i in range(rng.randrange(4)))
    tokens = {"tokens": {"top_k": 4}} if rng.randrange(2) else {}
    Manifest(identity=IDENTITY | tokens, corpus_counts={"documents": 3}, shards=plans).save(folder)
    path = folder / dump_files.MANIFEST
    path.write_bytes(mutated(path.read_bytes(), rng))
    found = Manifest.load(folder)
    assert all((folder / dump_files.SHARDS) in shard.path(folder).resolve().parents for shard in found.shards)
    found.save(folder)  # a number that is not finite is written as null
    again = Manifest.load(folder)
    again.save(folder)
    assert Manifest.load(folder) == again


TARGETS: dict[str, Callable[[Random, Path], None]] = {
    "corpus": corpus,
    "recipe": recipe,
    "shard": shard,
    "written": written,
    "vocabulary": vocabulary,
    "manifest": manifest,
}


def accepted(target: str, rng: Random, folder: Path) -> bool:
    """Tell if an input was accepted, not refused.

    Anything but a refusal with a message is raised on.
    """
    try:
        TARGETS[target](rng, folder)
    except (ValueError, OSError) as error:
        assert str(error).strip(), f"{target}: refused without a word"
        return False
    return True
