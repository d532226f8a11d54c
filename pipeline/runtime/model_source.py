"""Source of a model or tokenizer: its location, its revision, and whether code that comes with it may run."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelSource:
    """A model or tokenizer as transformers is told to find it.

    Attributes:
        source: a local folder or hub name; before it is resolved, anything that `pipeline.sources.resolve` accepts.
        revision: revision of a hub name; None for its main branch.
        trust_remote_code: whether Python code that comes with it may run.
    """

    source: str
    revision: str | None = None
    trust_remote_code: bool = False

    def at(self, source: str) -> "ModelSource":
        """Return a copy at another location, as after it is resolved."""
        return replace(self, source=source)

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained` that belong to the source."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def as_source(source: ModelSource | str) -> ModelSource:
    """Turn a bare folder or hub name into a source without a revision and without trust in its code."""
    return source if isinstance(source, ModelSource) else ModelSource(source)
