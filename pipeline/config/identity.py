"""The part of an identity that a recipe's sections decide, and the meaning of a key that an identity lacks.

A dump and a run keep the identity that they were begun with. A key added by a later release declares the value that
describes earlier behaviour (`pipeline.config.section.added`): an identity omits the key if it has that value, and an
identity without the key means that value. What an earlier release began can therefore continue, whatever keys and
defaults were added since, and any other value is refused by the key's name.
"""

from collections.abc import Collection, Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.recipe import Recipe
from schemas import manifest


def identity_values(section: BaseModel, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return a section as an identity holds it: as JSON, without added keys that describe earlier behaviour.

    Args:
        exclude: keys that do not decide content.
    """
    values: dict[str, Any] = {}
    for name, value in section.model_dump(mode="json", exclude=set(exclude)).items():
        field = type(section).model_fields.get(name)  # None: a key that the operator has named
        inner = getattr(section, name, None)
        held = identity_values(inner) if isinstance(inner, BaseModel) else value
        if field is None or not (_is_added(field) and held == _declared(field)["before"]):
            values[_stored_name(name, field)] = held
    return values


def added_values(section: BaseModel) -> dict[str, Any]:
    """Return the part of `identity_values` that the first release did not know.

    For a section of which an identity holds only chosen keys.
    """
    added = {_stored_name(name, field) for name, field in type(section).model_fields.items() if _is_added(field)}
    return {name: value for name, value in identity_values(section).items() if name in added}


def added_defaults(section: type[BaseModel]) -> dict[str, Any]:
    """Return a section's added keys, each with its meaning when an identity lacks it."""
    return {name: _declared(field)["before"] for name, field in section.model_fields.items() if _is_added(field)}


def identity_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return `field: theirs there, ours here` for each field in which two identities differ in meaning.

    A field has the name of its recipe's key, also where identities hold it under an earlier name.
    """
    return manifest.identity_differences(theirs, ours, dict(_absent(Recipe, "")), dict(_renamed(Recipe, "")))


def _absent(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the added keys below a section, dotted as in an identity, each with its meaning when absent."""
    for name, field in model.model_fields.items():
        if _is_added(field):
            yield f"{prefix}{_stored_name(name, field)}".removeprefix("dump."), _declared(field)["before"]
        for inner in _sections_of(field):
            yield from _absent(inner, f"{prefix}{name}.")


def _renamed(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the renamed keys below a section, dotted as in an identity, each with its present name."""
    for name, field in model.model_fields.items():
        if (stored := _stored_name(name, field)) != name:
            yield f"{prefix}{stored}".removeprefix("dump."), f"{prefix}{name}".removeprefix("dump.")
        for inner in _sections_of(field):
            yield from _renamed(inner, f"{prefix}{name}.")


def _sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the section types of a field, except those in a list, which identities hold as a whole."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _declared(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _is_added(field: FieldInfo) -> bool:
    return "before" in _declared(field)


def _stored_name(name: str, field: FieldInfo | None) -> str:
    return name if field is None else str(_declared(field).get("stored_as", name))
