"""Identity of a start: all that decides the student before its first step, as a run's identity holds it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import StudentConfig
from pipeline.config.identity import identity_values
from pipeline.runtime.plugins import sha256
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import read_json

MADE_FROM = "made_from.json"  # the start's identity; earlier releases wrote none
ROWS_CODE = "rows_sha256"  # by name, of the operator's own files that make rows; only where there are any
_KEYS = (
    *("model", "revision", "averaged_scale", "transfer", "drop_layers"),
    *("tokenizer_sha256", "template_sha256", "start_id", "end_id"),
    ROWS_CODE,
)


def start_identity(
    student: StudentConfig, tokenizer_sha256: str, ids: SpecialIds, template_sha256: str | None
) -> dict[str, Any]:
    """Return everything that decides the initial student.

    Args:
        template_sha256: of its chat template; None if it meets no chats.
    """
    values = {**identity_values(student), "tokenizer_sha256": tokenizer_sha256}
    template = {} if template_sha256 is None else {"template_sha256": template_sha256}
    ends = {"start_id": ids.document_start, "end_id": ids.end}
    return of_start({**values, **template, **ends, **rows_code(student)})


def rows_code(student: StudentConfig) -> dict[str, Any]:
    """Return the hashes of the operator's own files that make rows, as a part of an identity; empty without any."""
    files = {name: sha256(name) for name in student.transfer.files}
    return {ROWS_CODE: files} if files else {}


def of_start(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the student's section of a run's identity that decides the initial student."""
    return {key: identity[key] for key in _KEYS if key in identity}


def is_made(start: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether the folder holds the start with this identity."""
    path = start / MADE_FROM
    return path.exists() and read_json(path, remedy="Delete that folder to make it anew") == identity
