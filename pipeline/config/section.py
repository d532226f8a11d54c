"""What all sections of a recipe have in common."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

_NUMBERS = (int, float, int | None, float | None)
_LARGEST = 2**63 - 1


def plain_address(text: str) -> str:
    """The text itself. Raises ValueError, which does not repeat it, for an address (`scheme://`) that holds more than a place."""
    parts = urlsplit(text.rpartition("::")[2]) if "://" in text else None
    if parts and (parts.username or parts.password or parts.query or parts.fragment):
        raise ValueError(
            "an address must hold no user, password, query or fragment: recipes are stored, and go to a hub with their dump. Give keys "
            "by the environment, or fetch the file and name it by its path"
        )
    return text


class Section(BaseModel):
    """Keys that are not known are refused, and so are empty text, text with NUL, numbers that are not finite or too large for a machine,
    and truth where a number is wanted."""

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
