"""The card of a dump: what a hub and a person read in it, and what it must not reveal."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline.dumps.card import inline, public_name, write_card
from schemas.manifest import write_json
from schemas.snippets import snippets
from tests.support.readable_dumps import make_dump

SUMMARY = {"documents": 3, "records": 4, "bytes": 16, "left_out_unspellable": {"9": "why"}, "shards": []}


def make_card(folder: Path, licence: str | None, source: str = "corpus.jsonl") -> str:
    dump = make_dump(folder)
    write_json(dump / "summary.json", SUMMARY)
    recipe = {"corpus": {"source": source, "limit": 3}, "teacher": {"license": licence}}
    (dump / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return write_card(dump).read_text(encoding="utf-8")


def front(card: str) -> dict[str, object]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return dict(yaml.safe_load(found[1]))


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("llama3.1", {"license": "llama3.1"}),
        ("Some Licence: 2", {"license": "other", "license_name": "some-licence-2"}),
        (None, {"license": "unknown"}),
    ],
)
def test_a_hub_reads_licence_and_configuration(tmp_path: Path, licence: str | None, expected: dict[str, str]) -> None:
    values = front(make_card(tmp_path / "dump", licence))
    assert {key: values[key] for key in expected} == expected
    assert values["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "shards/**/*.parquet"}]}
    ]


def test_a_licence_that_binds_is_named_and_the_readers_snippet_is_the_specifications(tmp_path: Path) -> None:
    card = make_card(tmp_path / "dump", "gemma")
    assert "Gemma Terms of Use" in card and "BINDS" in card
    assert snippets()["pyarrow"].code in card


def test_names_from_outside_cannot_break_the_card(tmp_path: Path) -> None:
    card = make_card(tmp_path / "dump", "x | <script>\n---\n# owned", "https://a/<b>|c")
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in body and "<b>" not in body and "\n# owned" not in card
    assert front(card)["license_name"] == "x-script-owned" and inline("a|b\nc") == "a\\|b c"


def test_a_local_path_is_not_told(tmp_path: Path) -> None:
    card = make_card(tmp_path / "dump", None, "/home/someone/secret/corpus.jsonl")
    assert "corpus.jsonl" in card and "someone" not in card
    assert public_name("owner/model") == "owner/model" and public_name("~/a/b.txt") == "b.txt"
    assert public_name("pypi:a==1/b/c.txt") == "pypi:a==1/b/c.txt"


def test_an_audit_is_shown_where_there_is_one(tmp_path: Path) -> None:
    assert "## Audit" not in make_card(tmp_path / "dump", None)
    (tmp_path / "dump" / "audit.json").write_text(json.dumps({"canonical": {"mean_jsd_nats": 0.0073}}))
    card = write_card(tmp_path / "dump").read_text(encoding="utf-8")
    assert "canonical.mean" in card and "0.0073" in card


def test_a_dump_without_a_summary_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not complete"):
        write_card(make_dump(tmp_path / "dump"))
