"""Files of a corpus, and what is read of them."""

import json
from pathlib import Path
from typing import Any

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus


def corpus(path: Path | str, **keys: Any) -> Corpus:
    return Corpus(CorpusConfig(source=str(path), **keys))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(found: Corpus) -> list[bytes]:
    return [document.text for document in found.documents()]
