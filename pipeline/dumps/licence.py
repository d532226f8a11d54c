"""The teacher's licence: found where the model says it, and what it asks of a student that learns from its dump.

A pointer for the operator, not legal advice; the licence's own text decides.
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


_READ = "Read it before you pass on a dump or a student"
_PASS_ON = "the same use restrictions must be passed on"
# By a licence's id on model cards (`license:`, or `license_name:` with `license: other`): its name, and what it asks of
# a student, as its text stood when this was written; None where it asks nothing. The first that fits holds.
LICENCES: tuple[tuple[str, str, str | None], ...] = (
    (
        r"llama-?[23]",
        "the Llama 2 or Llama 3 Community License",
        "it forbids using the model's outputs to improve any large language model but Llama itself and its derivatives",
    ),
    (
        r"llama-?(3[._-][1-9]|4).*",
        "the Llama Community License",
        'a student that is distributed must have a name that begins with "Llama", come with that licence, and say "Built with Llama"',
    ),
    (
        r"gemma.*",
        "the Gemma Terms of Use",
        "a student that is distilled from it is a Model Derivative: it passes on only under the same use restrictions and notices",
    ),
    (r".*(open)?rail.*", "a RAIL licence", f"a student that is distilled from it is a derivative: {_PASS_ON}"),
    (
        r"(tongyi-)?qwen(-license.*|-research.*)?",
        "the Qwen licence",
        'a student that is distributed must show "Built with Qwen" or "Improved using Qwen"; the research form is not for commerce',
    ),
    (r"deepseek.*", "the DeepSeek model licence", f"a student that is distilled from it is a derivative: {_PASS_ON}"),
    (
        r"(mrl|mnpl|mistral-(ai-)?(research|non-production)).*",
        "a Mistral research licence",
        "research only; read what it says of derivatives",
    ),
    (
        r"cc-by-nc.*",
        "a non-commercial licence",
        "the teacher may not be used for commerce; whether a student may is not settled",
    ),
    (r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-4\.0|unlicense|zlib|openmdw.*", "an open licence", None),
)


def describe(licence: str | None) -> str:
    """One sentence on a teacher's licence, for whoever starts a dump or reads its card."""
    if licence is None:
        return "the teacher's licence is not known: nothing found says it. Look it up and set teacher.license, e.g. teacher.license=apache-2.0"
    wanted = licence.strip().lower()
    for pattern, name, asks in LICENCES:
        if re.fullmatch(pattern, wanted):
            if asks is None:
                return f"the teacher's licence is {licence}; it asks nothing of a student that is known here"
            return f"the teacher's licence {licence} ({name}) BINDS its students: {asks}. {_READ}"
    return f"the teacher's licence is {licence}, which is not known here: read what it says of outputs and derivatives"


def with_licence(recipe: Recipe, model: str) -> Recipe:
    """The recipe with `teacher.license` filled in, where it gives none and the model says one. `model` is the teacher,
    resolved.
    """
    if recipe.teacher.license is not None or recipe.teacher.is_mere_name:
        return recipe
    found = find_licence(recipe.teacher.model, model, recipe.teacher.revision)
    return recipe.with_values(teacher=recipe.teacher.model_copy(update={"license": found}))


def find_licence(source: str, model: str, revision: str | None = None) -> str | None:
    """What a model says its licence is: in its card's front matter, or in a .gguf's header. None where it does not
    say.
    """
    folder = Path(model)
    if (folder / "README.md").exists():
        return card_licence(folder / "README.md")
    if folder.exists() or source.startswith("pypi:"):
        return _gguf_licence(source)
    return _hub_licence(model, revision)


def card_licence(path: Path) -> str | None:
    """`license:` of a model card's front matter; `license_name:` where that is `other`."""
    try:
        values = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):  # no UTF-8, no mapping, no YAML: it says nothing
        return None
    found = values.get("license")
    found = ", ".join(map(str, found)) if isinstance(found, list) else found
    return _named(found, values.get("license_name"))


def _named(found: object, name: object) -> str | None:
    licence = name if found in ("other", None) and name else found
    return str(licence) if licence else None


def _hub_licence(model: str, revision: str | None) -> str | None:
    try:
        path = hf_hub_download(model, "README.md", revision=revision, etag_timeout=5)
    except Exception:  # no card, no network, no access: whatever it is, the licence is not known, and the dump goes on
        return None
    return card_licence(Path(path))


def _gguf_licence(source: str) -> str | None:
    path = resolve_file(source)
    if not isinstance(path, Path) or path.suffix != ".gguf":
        return None
    with path.open("rb") as file:
        values = gguf_header(file)
    return _named(values.get("general.license"), values.get("general.license.name"))


def gguf_header(file: IO[bytes]) -> dict[str, str]:
    """The texts among a GGUF's `general.*` values, which stand first. (The gguf package reads the whole vocabulary:
    seconds.)
    """
    found: dict[str, str] = {}
    magic, _, _, num_values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        return found
    for _ in range(num_values):
        key = _gguf_text(file)
        if not key.startswith("general."):
            break
        [kind] = struct.unpack("<I", file.read(4))
        value = _gguf_value(file, kind)
        if isinstance(value, str):
            found[key] = value
    return found


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
