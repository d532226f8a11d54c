"""What every section of a recipe is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: frozen, and a key it does not know is an error (see `pipeline.recipe`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
