"""Training from a dump compared with a teacher in memory: memory and time of a step.

    .venv/bin/python -m tests.bench.online [--dump runs/demo/dump] [--interface token_marginal] [--rounds 7]

The same student, documents, losses and loop. `online` asks the teacher within each step (transformers, the recipe's
dtype), reduces the whole softmax to bytes by the same code as a dump, and takes its targets from there; `offline` reads
them from shards. Each runs in a process of its own, and they take turns step by step (`tests.bench.turns`). All
documents have the same number of tokens. Both are in memory at once, some 4 GB each.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from pipeline.config import Recipe, student_config
from pipeline.corpus.documents import Document
from schemas.record import Record
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.records import make_records
from stage1_teacher.targets.resolved import load_tokenizer
from stage2_student.data.examples import Encoded
from stage2_student.model.initial_student import student_tokenizer
from stage2_student.training.rank_batches import BatchBuilder, HeldRecord, RankBatch
from tests.bench.turns import compare, equal_documents, train_in_turns, trainer_recipe


class Online:
    """A teacher in memory that gives records their targets."""

    def __init__(self, recipe: Recipe) -> None:
        model, tokenizer, _ = load_tokenizer(recipe)
        self._teacher = open_teacher(recipe, model, tokenizer)
        self._dump = recipe.dump

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Return the same documents with targets computed now."""
        teacher = self._teacher
        limits = teacher.max_tokens, teacher.overlap_tokens
        windows = [
            window
            for record in records
            for window in cut_document(Document(record.doc_id, record.document, None), teacher.tokenizer, *limits)
        ]
        assert len(windows) == len(records), "a document is longer than the teacher's context"
        return make_records(windows, teacher.run_engine(windows), teacher, self._dump)


def train_online(recipe: Recipe) -> None:
    """Run the real trainer, with `Online` between what it reads and what it encodes."""
    ask, encoded = Online(recipe), BatchBuilder.encoded

    def asked(self: BatchBuilder, share: RankBatch, records: Sequence[HeldRecord]) -> list[Encoded]:
        return encoded(
            self, share, [HeldRecord(record) for record in ask([held.record for held in records if held.record])]
        )

    BatchBuilder.encoded = asked  # type: ignore[method-assign]
    train_in_turns(recipe)


def main(
    dump: Annotated[Path, typer.Option(help="documents and targets to train on")] = Path("runs/demo/dump"),
    interface: Annotated[str, typer.Option(help="of the student")] = "token_marginal",
    rounds: Annotated[int, typer.Option(help="timed steps of each; the median counts")] = 7,
    tokens: Annotated[int, typer.Option(help="student tokens of a document")] = 512,
    documents: Annotated[int, typer.Option(help="documents of a step")] = 2,
    trainer: Annotated[list[str] | None, typer.Option(help="which, one or more: offline, online")] = None,
    save: Annotated[str, typer.Option(help="Keep the table as tests/bench/results/SAVE.json.")] = "",
    worker: Annotated[str | None, typer.Option(help="be one of the trainers", hidden=True)] = None,
    out: Annotated[Path, typer.Option(help="folder of the students", hidden=True)] = Path(),
) -> None:
    if worker is not None:
        recipe = trainer_recipe(out / "dump", out / worker, interface, tokens, documents)
        teacher = recipe.teacher.model_copy(update={"engine": "transformers", "max_tokens": 2 * tokens})
        (train_online if worker == "online" else train_in_turns)(recipe.with_values(teacher=teacher))
        return
    with TemporaryDirectory() as folder:
        recipe = trainer_recipe(dump, Path(folder), interface, tokens, documents)
        equal_documents(dump, Path(folder) / "dump", student_tokenizer(student_config(recipe)).tokenizer, tokens)
        shared = ["--interface", interface, "--tokens", str(tokens), "--documents", str(documents), "--out", folder]
        names = {"offline": "offline: from shards", "online": "online: the teacher in memory"}
        arguments = {names[name]: ["--worker", name, *shared] for name in trainer or names}
        compare("tests.bench.online", arguments, rounds, tokens * documents, save)


if __name__ == "__main__":
    typer.run(main)
