"""What all sections of a recipe have in common."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

_NUMBERS = (int, float, int | None, float | None)
_LARGEST = 2**63 - 1


def plain_address(text: str) -> str:
    """The text itself. Raises ValueError, which does not repeat it, for an address (`scheme://`) that holds more than a
    place.
    """
    parts = urlsplit(text.rpartition("::")[2]) if "://" in text else None
    if parts and (parts.username or parts.password or parts.query or parts.fragment):
        raise ValueError(
            "an address must hold no user, password, query or fragment: recipes are stored, and go to a hub with their dump. Give keys "
            "by the environment, or fetch the file and name it by its path"
        )
    return text


def added(since: str, before: Any, stored_as: str | None = None) -> dict[str, Any]:
    """Return the `json_schema_extra` of a field that belongs to an identity and came after the first release.

    Args:
        since: the release that it came with.
        before: the value, as JSON has it, that says what was done before there was such a key: an identity leaves the
            key out where it has this value, and means it where it lacks the key (see `pipeline.config.identity`). It
            stays when the default changes.
        stored_as: the key's name in identities, where the recipe's key has been renamed since.
    """
    return {"since": since, "before": before} | ({} if stored_as is None else {"stored_as": stored_as})


def stored_as(name: str) -> dict[str, Any]:
    """Return the `json_schema_extra` of a renamed field of the first release: its name in identities, which stays."""
    return {"stored_as": name}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names, however deep: `Section | None`, `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


class Section(BaseModel):
    """Keys that are not known are refused, and so are empty text, text with NUL, numbers that are not finite or too
    large for a machine, and truth where a number is wanted.
    """

    renamed: ClassVar[
        Mapping[str, str]
    ] = {}  # old names of keys, for a release, to the new ones (`pipeline.config.renamed`)
    model_config = ConfigDict(extra="forbid", frozen=True, str_min_length=1, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _values_that_a_machine_can_hold(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation in _NUMBERS:
                raise ValueError(f"{name} is {value}, and has to be a number")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise ValueError(f"{name} is {value}, beyond {_LARGEST}, the largest number of 64 bits")
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name} is {value!r}, which holds a NUL character: take it out")
        return values
