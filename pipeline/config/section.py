"""Base class of all recipe sections, and helpers for their fields."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

_NUMBERS = (int, float, int | None, float | None)
_MAX_NUMBER = 2**63 - 1


def plain_address(text: str) -> str:
    """Return the text unless it is an address (`scheme://`) that may hold a secret.

    Raises ValueError, which does not repeat the text, for an address with a user, password, query or fragment.
    """
    parts = urlsplit(text.rpartition("::")[2]) if "://" in text else None
    if parts and (parts.username or parts.password or parts.query or parts.fragment):
        raise ValueError(
            "an address must hold no user, password, query or fragment: recipes are stored, and are pushed to a hub "
            "with their dump. Give keys in environment variables, or fetch the file and give its path"
        )
    return text


def added(since: str, before: Any, stored_as: str | None = None) -> dict[str, Any]:
    """Return the `json_schema_extra` of a field that belongs to an identity and came after the first release.

    Args:
        since: the release that introduced it.
        before: the value, as in JSON, that describes the behaviour before the key existed: an identity omits the key if
            it has this value, and an identity without the key means it (see `pipeline.config.identity`). It stays the
            same when the default changes.
        stored_as: the key's name in identities, if the recipe's key has been renamed since.
    """
    return {"since": since, "before": before} | ({} if stored_as is None else {"stored_as": stored_as})


def stored_as(name: str) -> dict[str, Any]:
    """Return the `json_schema_extra` of a renamed field of the first release: its permanent name in identities."""
    return {"stored_as": name}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names at any depth: `Section | None`, `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


class Section(BaseModel):
    """Base of all recipe sections: a frozen model with strict checks.

    Refuses unknown keys, empty text, text with NUL, numbers that are not finite or exceed 64 bits, and booleans where a
    number is expected.
    """

    # Old names of keys, valid for one more release, to the new ones (`pipeline.config.renamed`).
    renamed: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", frozen=True, str_min_length=1, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _values_that_a_machine_can_hold(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation in _NUMBERS:
                raise ValueError(f"{name} is {value}, but must be a number")
            if isinstance(value, int) and abs(value) > _MAX_NUMBER:
                raise ValueError(f"{name} is {value}, beyond {_MAX_NUMBER}, the largest 64-bit number")
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name} is {value!r}, which holds a NUL character: remove it")
        return values
