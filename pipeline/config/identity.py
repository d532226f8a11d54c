"""The part of an identity that a recipe's sections decide, and the meaning of a key that an identity lacks.

A dump and a run are held to the identity that they were begun with. A key that a release adds says what was done before
it came (`pipeline.config.section.added`): an identity leaves it out where it has that value, and has that value where
it leaves it out. So what an earlier release began goes on, whatever keys and defaults have come since, and another
value is refused by the key's name.
"""

from collections.abc import Collection, Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.recipe import Recipe
from schemas import manifest


def identity_values(section: BaseModel, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return a section as an identity holds it: as JSON, without added keys whose value is what was done before them.

    Args:
        exclude: keys that decide no content.
    """
    values: dict[str, Any] = {}
    for name, value in section.model_dump(mode="json", exclude=set(exclude)).items():
        field = type(section).model_fields.get(name)  # None: a key that the operator has named
        inner = getattr(section, name, None)
        held = identity_values(inner) if isinstance(inner, BaseModel) else value
        if field is None or not (_is_added(field) and held == _said(field)["before"]):
            values[_stored_name(name, field)] = held
    return values


def added_values(section: BaseModel) -> dict[str, Any]:
    """Return the part of `identity_values` that no first release knew; for a section of which an identity holds chosen
    keys.
    """
    added = {_stored_name(name, field) for name, field in type(section).model_fields.items() if _is_added(field)}
    return {name: value for name, value in identity_values(section).items() if name in added}


def identity_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return `field: theirs there, ours here` for each field in which two identities, of dumps or of runs, differ in
    meaning.
    """
    return manifest.identity_differences(theirs, ours, dict(_absent(Recipe, "")))


def _absent(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the added keys below a section, dotted as in an identity, with what they mean where they are absent."""
    for name, field in model.model_fields.items():
        if _is_added(field):
            yield f"{prefix}{_stored_name(name, field)}".removeprefix("dump."), _said(field)["before"]
        for inner in _sections_of(field):
            yield from _absent(inner, f"{prefix}{name}.")


def _sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The section that a field is, or may be; not those of a list, which identities hold whole."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _said(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _is_added(field: FieldInfo) -> bool:
    return "before" in _said(field)


def _stored_name(name: str, field: FieldInfo | None) -> str:
    return name if field is None else str(_said(field).get("stored_as", name))
