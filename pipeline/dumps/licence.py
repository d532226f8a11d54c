"""The teacher's licence: where the model states it, and its requirements on a student trained from the dump.

A pointer for the operator, not legal advice; the text of the licence decides.
"""

import re
import struct
from pathlib import Path
from typing import IO, Any

import yaml
from huggingface_hub import hf_hub_download, metadata_load

from pipeline.config import Recipe
from pipeline.sources.resolve import resolve_file

_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


_READ = "Read it before you distribute a dump or a student"
_PASS_ON = "the same use restrictions must be passed on"
# By the licence's id on model cards (`license:`, or `license_name:` with `license: other`): its name, and its
# requirements on a student, according to its text when this was written; None if it has none. The first match counts.
LICENCES: tuple[tuple[str, str, str | None], ...] = (
    (
        r"llama-?[23]",
        "the Llama 2 or Llama 3 Community License",
        "it forbids using the model's outputs to improve any large language model "
        "except Llama itself and its derivatives",
    ),
    (
        r"llama-?(3[._-][1-9]|4).*",
        "the Llama Community License",
        'a distributed student must have a name that begins with "Llama", include that licence, '
        'and say "Built with Llama"',
    ),
    (
        r"gemma.*",
        "the Gemma Terms of Use",
        "a student distilled from it is a Model Derivative: "
        "it may be distributed only under the same use restrictions and notices",
    ),
    (r".*(open)?rail.*", "a RAIL licence", f"a student distilled from it is a derivative: {_PASS_ON}"),
    (
        r"(tongyi-)?qwen(-license.*|-research.*)?",
        "the Qwen licence",
        'a distributed student must show "Built with Qwen" or "Improved using Qwen"; '
        "the research variant forbids commercial use",
    ),
    (r"deepseek.*", "the DeepSeek model licence", f"a student distilled from it is a derivative: {_PASS_ON}"),
    (
        r"(mrl|mnpl|mistral-(ai-)?(research|non-production)).*",
        "a Mistral research licence",
        "research only; read what it says about derivatives",
    ),
    (
        r"cc-by-nc.*",
        "a non-commercial licence",
        "the teacher may not be used commercially; whether a student may is not settled",
    ),
    (r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-4\.0|unlicense|zlib|openmdw.*", "an open licence", None),
)


def describe(licence: str | None) -> str:
    """Return one sentence on a teacher's licence, for those who start a dump or read its card."""
    if licence is None:
        return (
            "the teacher's licence is not known: the model does not state it. "
            "Look it up and set teacher.license, e.g. teacher.license=apache-2.0"
        )
    key = licence.strip().lower()
    if key == "unknown":  # as our own card says of a student's
        return "the teacher's licence is given as unknown: look it up before you pass on what is made with it"
    for pattern, name, requirement in LICENCES:
        if re.fullmatch(pattern, key):
            if requirement is None:
                return f"the teacher's licence is {licence}; no requirement on a student is known here"
            return f"the teacher's licence {licence} ({name}) BINDS its students: {requirement}. {_READ}"
    return (
        f"the teacher's licence is {licence}, which is not known here: read what it says about outputs and derivatives"
    )


def binds(licence: str | None) -> bool:
    """Tell whether a teacher's licence has, or may have, requirements on a student: also one that is not known here."""
    known = (entry for entry in LICENCES if licence and re.fullmatch(entry[0], licence.strip().lower()))
    return next((requirement is not None for _, _, requirement in known), True)


def with_licence(recipe: Recipe, model: str) -> Recipe:
    """Return the recipe with `teacher.license` filled in, if it gives none and the model states one.

    `model` is the teacher, resolved.
    """
    if recipe.teacher.license is not None or recipe.teacher.is_mere_name:
        return recipe
    licence = find_licence(recipe.teacher.model, model, recipe.teacher.revision)
    return recipe.with_values(teacher=recipe.teacher.model_copy(update={"license": licence}))


def find_licence(source: str, model: str, revision: str | None = None) -> str | None:
    """Return the licence that a model states in its card's front matter or a .gguf's header; None if it states none."""
    folder = Path(model)
    if (folder / "README.md").exists():
        return card_licence(folder / "README.md")
    if folder.exists() or source.startswith("pypi:"):
        return _gguf_licence(source)
    return _hub_licence(model, revision)


def card_licence(path: Path) -> str | None:
    """Read `license:` from a model card's front matter, or `license_name:` if that is `other`."""
    try:
        values = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):  # not UTF-8, not a mapping, not YAML: it states no licence
        return None
    licence = values.get("license")
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
    return _licence_or_name(licence, values.get("license_name"))


def _licence_or_name(licence: object, name: object) -> str | None:
    stated = name if licence in ("other", None) and name else licence
    return str(stated) if stated else None


def _hub_licence(model: str, revision: str | None) -> str | None:
    try:
        path = hf_hub_download(model, "README.md", revision=revision, etag_timeout=5)
    except Exception:  # no card, no network or no access: the licence is not known, and the dump continues
        return None
    return card_licence(Path(path))


def _gguf_licence(source: str) -> str | None:
    path = resolve_file(source)
    if not isinstance(path, Path) or path.suffix != ".gguf":
        return None
    with path.open("rb") as file:
        values = gguf_header(file)
    return _licence_or_name(values.get("general.license"), values.get("general.license.name"))


def gguf_header(file: IO[bytes]) -> dict[str, str]:
    """Read the strings among a GGUF's `general.*` values, which come first.

    The gguf package would read the whole vocabulary, which takes seconds.
    """
    texts: dict[str, str] = {}
    magic, _, _, num_values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        return texts
    for _ in range(num_values):
        key = _gguf_text(file)
        if not key.startswith("general."):
            break
        [kind] = struct.unpack("<I", file.read(4))
        value = _gguf_value(file, kind)
        if isinstance(value, str):
            texts[key] = value
    return texts


def _gguf_text(file: IO[bytes]) -> str:
    [length] = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8", errors="replace")


def _gguf_value(file: IO[bytes], kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _gguf_text(file)
    if kind == _GGUF_ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        return [_gguf_value(file, inner) for _ in range(length)]
    return file.read(_GGUF_SIZES[kind])
