"""The teacher's licence: where it is found, and which licences bind a student."""

import io
import struct
from pathlib import Path

import pytest

from pipeline.config import Recipe
from pipeline.dumps import licence

CARDS = [
    ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
    ("---\nlanguage: en\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
    ("---\nlicense: other\n---", "other"),
    ("---\nlicense:\n- mit\n- gemma\n---\n", "mit, gemma"),
    ("# A model\nlicense: mit", None),
    ("---\nlicense: [unclosed\n---\n", None),
    ("---\n- a list\n---\n", None),
    ("\ufeff---\r\nlicense: gemma\r\n---\r\n", "gemma"),
    ("---\nlicense: mit\n---\n\udcff", None),  # no UTF-8: not known, rather than half read
]


@pytest.mark.parametrize(("card", "expected"), CARDS)
def test_a_card_says_its_licence_in_its_front_matter(tmp_path: Path, card: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode("utf-8", "surrogateescape"))
    assert licence.find_licence(str(tmp_path), str(tmp_path)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "llama2",
        "llama3",
        "llama3.1",
        "Llama-3.2",
        "llama4",
        "gemma",
        "openrail++",
        "bigscience-bloom-rail-1.0",
        "qwen-research",
        "mrl",
        "cc-by-nc-4.0",
    ],
)
def test_a_licence_that_binds_students_says_so(name: str) -> None:
    assert "BINDS" in licence.describe(name)


@pytest.mark.parametrize("name", ["apache-2.0", "MIT", "bsd-3-clause", "some-licence-of-ours", None])
def test_a_licence_that_is_not_known_to_bind_does_not_claim_to(name: str | None) -> None:
    assert "BINDS" not in licence.describe(name)


def test_what_is_not_known_is_said_with_the_key_to_set() -> None:
    assert "teacher.license=" in licence.describe(None)


def recipe(model: str, **teacher: object) -> Recipe:
    return Recipe.model_validate(
        {"corpus": {"source": "x"}, "teacher": {"model": model, **teacher}, "dump": {"path": "d"}}
    )


def test_the_recipes_own_word_goes_before_the_cards(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    found = licence.with_licence(recipe(str(tmp_path)), str(tmp_path))
    assert found.teacher.license == "llama3.1"
    assert licence.with_licence(recipe(str(tmp_path), license="mit"), str(tmp_path)).teacher.license == "mit"


def gguf(path: Path, *values: tuple[str, int, bytes]) -> Path:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    body = b"".join(text(key.encode()) + struct.pack("<I", kind) + value for key, kind, value in values)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values)) + body)
    return path


def test_a_gguf_says_its_licence_in_its_header(tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    languages = struct.pack("<IQ", 8, 2) + text(b"en") + text(b"fr")
    values = [
        ("general.architecture", 8, text(b"llama")),
        ("general.file_type", 4, struct.pack("<I", 3)),
        ("general.languages", 9, languages),
        ("general.license", 8, text(b"gemma")),
        ("llama.context_length", 99, b""),  # unknown kinds after it are not looked at
    ]
    path = gguf(tmp_path / "model.gguf", *values)
    assert licence.find_licence(str(path), str(tmp_path)) == "gemma"
    assert licence.gguf_header(io.BytesIO(b"no gguf at all, but long enough")) == {}
    assert licence.find_licence(str(tmp_path), str(tmp_path)) is None


def test_a_teacher_that_is_a_mere_name_at_a_server_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licence, "_hub_licence", lambda *_: pytest.fail("looked up"))
    served = {"engine": "openai", "tokenizer": "a/tokenizer"}
    values = {"corpus": {"source": "x"}, "teacher": {"model": "ours", **served}, "dump": {"path": "d"}}
    made = Recipe.model_validate({**values, "placement": {"base_url": "http://127.0.0.1:1/v1"}})
    assert licence.with_licence(made, "ours").teacher.license is None
