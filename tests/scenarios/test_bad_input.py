"""User errors through the real command: one line that names file, record, value and a way out.

Never a traceback.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import cli
from schemas.manifest import Manifest, ShardPlan, write_json
from schemas.shard import commit_shard, read_shard, to_table
from schemas.storage.locations import location
from stage1_teacher.dump.shard_plan import MAX_DOCUMENTS, plan_shards
from stage1_teacher.dump.summary import summarise
from stage2_student.data.reader import DumpReader
from tests.stage1_teacher.dump.test_run import write_recipe
from tests.support.readable_dumps import IDENTITY, finish, make_dump, make_record, varied_record, write_dump
from tests.support.tiny import tiny_model

Bld = Callable[..., tuple[int, str]]
KEYS = ("BLD_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
IDS = ["../../out", "/abs/out", "a/b", "..", "a\u202eb", "<script>x</script>", "x\x00y", "same", "same", "\x1b[31mred"]
TEXTS = [
    "the thing",
    "שלום עולם, and مرحبا",
    "e\u0301\u0302 a\u0308 \u200b",
    "<|endoftext|> is text <|endoftext|>",
    "a\x00b",
    "<b>&amp;</b>",
    "one",
    "and",
    "another",
    "in",
]


@pytest.fixture
def bld(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bld:
    """Run a command; return its exit code and its whole output."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bld", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_path_that_is_something_else_is_named_with_a_way_out(
    bld: Bld, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "r", model, ["a"])
    Path("file").write_text("x")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    a_file_where = "Not a directory: .*file.*Part of this path is a file where a folder is needed: give another path"
    nowhere = "a symbolic link that leads nowhere"
    cases = [
        (("teacher", recipe, "-o", "dump.path=file"), a_file_where),
        (("teacher", recipe, "-o", "dump.path=file/dump"), a_file_where),
        (("teacher", recipe, "-o", "dump.path=loop"), "leads back to itself: remove that link"),
        (("teacher", recipe, "-o", f"dump.path={'x' * 300}"), "Give a shorter path"),
        (("teacher", recipe, "-o", "corpus.source=loop"), nowhere),
        (("teacher", recipe, "-o", "teacher.model=loop"), nowhere),
        (("teacher", recipe, "-o", "teacher.model=./file"), "is not a model: give a Hugging Face folder"),
        (("teacher", recipe, "-o", "teacher.model=./folder"), "folder holds no config.json"),
        (("teacher", recipe, "-o", "teacher.tokenizer=./folder"), "holds neither tokenizer.json"),
        (
            ("teacher", recipe, "-o", "teacher.model=https://me:geheim@h/m"),
            "models and tokenizers are not read from addr",
        ),
        (("teacher", "folder"), "no recipe 'folder': give a YAML file, or one of demo"),
        (("merge", "out", "loop", "folder"), "loop is not a dump"),
        (("merge", "loop", "loop", "folder"), "is one of the dumps to merge; give a new folder"),
        *(((command, "file"), "file is not a dump: it holds no manifest.json") for command in ("inspect", "verify")),
        (("report", "loop"), "is not a student's run"),
    ]
    for arguments, said in cases:
        code, text = bld(*arguments)
        assert code == 1 and re.search(said, text.splitlines()[-1]), (arguments, text)
        assert "Traceback" not in text and "geheim" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"r", "file", "folder", "loop"}
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"recipe.yaml", "corpus.jsonl"}


@contextmanager
def without_rights() -> Iterator[Path]:
    """Make a folder that a user other than root may read but not write."""
    folder = Path(tempfile.mkdtemp(prefix="bld-rights-"))
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_what_may_not_be_read_or_written_is_named_with_a_way_out(bld: Bld) -> None:
    with without_rights() as folder:
        dump = make_dump(folder / "dump")
        (dump / "shards" / "part-00000.parquet").chmod(0)
        (folder / "r.yaml").write_text("x")
        (folder / "r.yaml").chmod(0)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        right = "Give this user access to it"
        code, text = bld("verify", dump)
        assert code == 1 and "part-00000.parquet: cannot be read (Permission denied); give this user permission" in text
        assert "delete it" not in text.splitlines()[0]
        for arguments, said in (
            (("inspect", dump), f"part-00000.parquet.*{right}"),
            (("teacher", folder / "r.yaml"), f"r.yaml.*{right}"),
            (("inspect", dump, "--doc", "x", "--html", folder / "x.html"), right),
        ):
            code, text = bld(*arguments)
            assert code == 1 and re.search(said, text), (arguments, text)


def test_names_and_texts_of_any_kind_are_kept_and_lead_nowhere(
    bld: Bld, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's name may hold spaces and other scripts; no key from the environment is printed or stored."""
    for key in KEYS:
        monkeypatch.setenv(key, "geheim-4711")
    home = tmp_path / "ein Ordner é שלום"
    recipe = write_recipe(home, model, [], audit_documents=0, shard_bytes=10_000)
    rows = [json.dumps({"text": text, "id": name}) for text, name in zip(TEXTS, IDS, strict=True)]
    rows[3:3] = ["{oops", '{"id": 1}']
    (home / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    dump, before = home / "dump", everything(tmp_path)
    code, text = bld("teacher", recipe, "-o", "corpus.id_field=id")
    told = text
    assert code == 0
    assert re.search(r"warning: 1 row is left out: malformed JSON; the first: .*corpus\.jsonl, line 4", text)
    assert re.search(r"warning: 1 row is left out: no field 'text'; the first: .*corpus\.jsonl, line 5", text)
    assert all(dump in path.parents or path == dump for path in everything(tmp_path) - before)
    assert [path.name for path in (dump / "shards").glob("*.parquet")] == ["part-00000.parquet"]
    records = list(read_shard(dump / "shards" / "part-00000.parquet"))
    assert [(record.doc_id, record.document.decode()) for record in records] == list(zip(IDS, TEXTS, strict=True))
    assert bld("verify", dump)[0] == 0
    for name in set(IDS) - {"x\x00y"}:  # no argument of a command can hold NUL
        code, text = bld("inspect", dump, "--doc", name, "--html", home / "page.html")
        page = (home / "page.html").read_text(encoding="utf-8")
        assert code == 0 and "<script>x" not in page
        assert not set("\x00\x1b\u202e") & set(page)
        assert ("2 documents are named 'same'; this is number 1 (--nth chooses)" in text) == (name == "same")
        told += text + page
    assert json.loads(bld("inspect", dump, "--doc", "same", "--nth", "2", "--json")[1].splitlines()[0])["positions"]
    code, text = bld("inspect", dump, "--doc", "same", "--nth", "3")
    assert code == 1 and "holds 2 documents named 'same'; there is no --nth 3" in text
    for options in ((), ("--worst", "3"), ("--find", "a"), ("--json",)):
        code, text = bld("inspect", dump, "--nth", "2", *options)
        assert code == 1 and "--nth 2 chooses among documents of one name: give it with --doc ID" in text
    for options in (("--worst", "10"), ("--find", "a"), ("--doc", "none such")):
        told += (text := bld("inspect", dump, *options)[1])
        assert not set("\x00\x1b\u202e") & set(text)
    assert "geheim" not in told
    assert not [path for path in everything(tmp_path) if path.is_file() and b"geheim" in path.read_bytes()]


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def shard_of(dump: Path) -> Path:
    return dump / "shards" / "part-00000.parquet"


RECORDS = [make_record("a", b"some text"), varied_record("b", 0)]
METADATA = {"shard_sha256": "s", "engine": "e", "left_out": "{}", "teacher_tokens": "9", "computed_tokens": "9"}


def commit(dump: Path, table: pa.Table, **metadata: str) -> None:
    more = {f"bld.{key}".encode(): value.encode() for key, value in (METADATA | metadata).items()}
    commit_shard(table.replace_schema_metadata({**table.schema.metadata, **more}), shard_of(dump), 1)


def sound_dump(folder: Path) -> Path:
    """Make a dump in which `bld verify` finds no fault."""
    num_bytes = sum(len(record.document) for record in RECORDS)
    plan = ShardPlan(index=0, first_document=0, num_documents=2, num_bytes=num_bytes, sha256="s")
    found = Manifest(identity=IDENTITY, corpus_counts={"documents": 2}, accepted_engines=("e",), shards=(plan,))
    (folder / "shards").mkdir(parents=True)
    found.save(folder)
    commit(folder, to_table(RECORDS, IDENTITY))
    write_json(folder / "summary.json", summarise(folder, found))
    return folder


def crafted(column: str, value: object) -> Callable[[Path], None]:
    """Put another value into one cell of a sealed shard; of a list, into its first place."""

    def craft(dump: Path) -> None:
        table = to_table(RECORDS, IDENTITY)
        index = table.schema.get_field_index(column)
        cells = table.column(index).to_pylist()
        cells[1] = [value, *cells[1][1:]] if isinstance(cells[1], list) else value
        field = table.schema.field(index)
        if isinstance(value, bytes):  # not UTF-8, though the column is text
            cells[0], kind = cells[0].encode(), pa.binary()
        else:
            kind = field.type
        commit(dump, table.set_column(index, field, pa.array(cells, type=kind).view(field.type)))

    return craft


def crafted_version(version: str) -> Callable[[Path], None]:
    return lambda dump: commit(dump, to_table(RECORDS, IDENTITY), schema_version=version)


def manifest(old: str, new: str) -> Callable[[Path], None]:
    def spoil(dump: Path) -> None:
        path = dump / "manifest.json"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


SHARD, MANIFEST, SUMMARY = r"part-00000\.parquet", r"manifest\.json is damaged", r"summary\.json is damaged"
RECORD = rf"{SHARD}, record 1 \(doc_id '.*'\): "
FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (crafted("realised_logprobs", float("nan")), RECORD + "a stored log-probability is positive or not finite"),
    (crafted("realised_logprobs", 0.5), RECORD + "a stored log-probability is positive or not finite"),
    (crafted("other_counts", 65535), RECORD + "entry columns differ in length"),
    (crafted("other_symbols", ord("a")), RECORD + "other_symbols of a position do not ascend, or have the document's"),
    (crafted("teacher_token_lengths", -3), RECORD + "teacher tokens do not span"),
    (crafted("segment_starts", -3), RECORD + "a segment lies outside"),
    (crafted("segment_lengths", 2**31 - 1), RECORD + "a segment lies outside"),
    (crafted("window_start", -5), RECORD + "its window starts before the document"),
    (crafted("document", b"\xff" * 32), RECORD + "its text, or that of a message, is not UTF-8"),
    (crafted_version("99"), SHARD + ".*version"),
    (crafted_version("x"), SHARD + ".*version"),
    (lambda dump: shard_of(dump).write_bytes(shard_of(dump).read_bytes()[:900]), SHARD),
    (lambda dump: shard_of(dump).write_bytes(b""), SHARD),
    (manifest('"index": 0', '"index": "../../x"'), MANIFEST + ": shards.0.index is '../../x'"),
    (manifest('"index": 0', '"index": -7'), MANIFEST + ": shards.0.index is -7"),
    (manifest('"schema_version": 3', '"schema_version": 99'), r"manifest\.json.*99"),
    (lambda dump: (dump / "manifest.json").write_text("[1]"), MANIFEST + ": it holds no object"),
    (lambda dump: (dump / "manifest.json").write_text('{"sche'), MANIFEST + ".*Fetch the dump again"),
    (lambda dump: (dump / "summary.json").write_text("{"), SUMMARY),
    (lambda dump: (dump / "summary.json").write_text("{}"), SUMMARY + ": it holds no shards"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_dump_that_is_crafted_or_damaged_is_refused_by_every_command_in_words(
    bld: Bld, tmp_path: Path, number: int
) -> None:
    spoil, said = FAULTS[number]
    good = finish(write_dump(tmp_path / "good", [[varied_record("other", 3)]]))
    dump = sound_dump(tmp_path / "dump")
    assert number or bld("verify", dump) == (0, f"{dump}: no faults\n")
    spoil(dump)
    before = everything(tmp_path)
    code, text = bld("verify", dump)
    assert code == 1 and re.search(said, text), text
    in_summary = "summary" in said
    for arguments in (("inspect", dump), ("merge", tmp_path / "out", good, dump), ("push", dump, "a/b")):
        code, text = bld(*arguments)
        assert "Traceback" not in text
        if not (in_summary and arguments[0] == "inspect"):
            assert code == 1 and ("part-00000.parquet" in text or ".json" in text), (arguments, text)
    assert everything(tmp_path) - before <= {dump / "README.md"}
    if not in_summary:
        with pytest.raises((ValueError, OSError), match=r"part-00000\.parquet|manifest\.json"):
            list(DumpReader(location(str(dump)), 0).records())


def test_a_shard_that_does_not_say_what_made_it_is_refused_in_words(bld: Bld, tmp_path: Path) -> None:
    dump = sound_dump(tmp_path / "dump")
    commit_shard(to_table(RECORDS, IDENTITY), shard_of(dump), 1)
    code, text = bld("verify", dump)
    missing = ", ".join(
        f"bld.{key}" for key in ("left_out", "teacher_tokens", "computed_tokens", "shard_sha256", "engine")
    )
    assert code == 1 and f"its Parquet metadata lacks {missing}; delete it and run `bld teacher` again" in text
    with pytest.raises(ValueError, match=r"part-00000\.parquet is not a shard made by stage 1"):
        summarise(dump, Manifest.load(dump))


def test_a_million_documents_of_one_byte_make_shards_that_fit_into_memory() -> None:
    from pipeline.corpus.documents import Document

    number = 1_000_000
    shards = list(plan_shards((Document(str(i), b"x", None) for i in range(number)), 16 << 20))
    assert [shard.num_documents for shard in shards] == [MAX_DOCUMENTS] * (number // MAX_DOCUMENTS) + [
        number % MAX_DOCUMENTS
    ]
    assert sum(shard.num_bytes for shard in shards) == number
    assert all(one.first_document + one.num_documents == two.first_document for one, two in pairwise(shards))
