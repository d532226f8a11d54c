"""A model or tokenizer to load: where it is, in which revision, and whether code that comes with it may run."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelSource:
    """What names a model or tokenizer to transformers.

    Attributes:
        source: a local folder or hub name; as an operator writes it, what `pipeline.sources.resolve` takes besides.
        revision: of a hub name; None for its main branch.
        trust_remote_code: Python code that comes with it may run.
    """

    source: str
    revision: str | None = None
    trust_remote_code: bool = False

    def at(self, source: str) -> "ModelSource":
        """Return the same found elsewhere, as once it is resolved."""
        return replace(self, source=source)

    @property
    def options(self) -> dict[str, Any]:
        """Return the keywords that `from_pretrained` takes beside the source."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def as_source(source: ModelSource | str) -> ModelSource:
    """Return a mere folder or hub name as a source: no revision, and no code of its own runs."""
    return source if isinstance(source, ModelSource) else ModelSource(source)
