"""Our trainer beside TRL's SFTTrainer: same model, documents, dtype and optimizer.

Weights are float32, with bfloat16 autocast.

    .venv/bin/python -m pip install --no-deps --target runs/trl trl==1.16.0
    .venv/bin/python -m tests.bench.trl_sft [--trl runs/trl] [--dump runs/demo/dump] [--rounds 7]

TRL stands in a folder of its own, and uses what `.venv` has of all else. Each trainer runs its whole loop in a process
of its own; they take turns step by step (`tests.bench.turns`). All documents have the same number of tokens, so that
nothing is padded. Ours reads and encodes its batch within the step, without making any ahead; TRL is given tokens.
`sft` is cross-entropy alone, as TRL's. All of them are in memory at once, some 4 GB each.
"""

import sys
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, TrainerCallback

from pipeline.config import Recipe, student_config
from stage2_student.data.reader import DumpReader
from stage2_student.model.initial_student import end_tokens, export_start, load_start, student_tokenizer
from tests.bench.turns import FOREVER, Turn, compare, equal_documents, train_in_turns, trainer_recipe

OURS = ("sft", "token_marginal")


class InTurns(TrainerCallback):
    """Callback that waits for its turn before each step of TRL's trainer."""

    def __init__(self) -> None:
        self._turn = Turn()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._turn.wait()


def train_with_trl(recipe: Recipe, out: Path, documents: int) -> None:
    """Run TRL's trainer on the same tokens.

    Defaults, except for what our recipe decides, and no checkpointing of activations.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config, train = student_config(recipe), recipe.train
    tokenizer = student_tokenizer(config).tokenizer
    first = end_tokens(config, tokenizer).start
    start = export_start(recipe)
    of_epoch = takewhile(lambda item: item[1].epoch == 0, DumpReader(Path(recipe.dump.path), 0).records())
    rows = [[first, *tokenizer.encode(record.document)] for record, _ in of_epoch]
    wrapped = AutoTokenizer.from_pretrained(start)
    wrapped.pad_token = wrapped.pad_token or wrapped.eos_token or "<|endoftext|>"
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=FOREVER,
        per_device_train_batch_size=documents,
        learning_rate=train.lr,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=train.grad_clip,
        lr_scheduler_type="cosine",
        warmup_steps=train.warmup_steps,
        optim="adamw_torch",
        bf16=train.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    SFTTrainer(
        model=load_start(start, False).train(),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=wrapped,
        callbacks=[InTurns()],
    ).train()


def main(
    trl: Annotated[Path, typer.Option(help="folder that TRL was installed to")] = Path("runs/trl"),
    dump: Annotated[Path, typer.Option(help="documents and targets to train on")] = Path("runs/demo/dump"),
    rounds: Annotated[int, typer.Option(help="timed steps of each trainer; the median counts")] = 7,
    tokens: Annotated[int, typer.Option(help="student tokens of a document")] = 512,
    documents: Annotated[int, typer.Option(help="documents of a step")] = 2,
    trainer: Annotated[list[str] | None, typer.Option(help="which, one or more: trl, sft, token_marginal")] = None,
    save: Annotated[str, typer.Option(help="Keep the table as tests/bench/results/SAVE.json.")] = "",
    worker: Annotated[str | None, typer.Option(help="be one of the trainers", hidden=True)] = None,
    out: Annotated[Path, typer.Option(help="folder of the students", hidden=True)] = Path(),
) -> None:
    if worker is not None:
        recipe = trainer_recipe(out / "dump", out, "sft" if worker == "trl" else worker, tokens, documents)
        if worker != "trl":
            train_in_turns(recipe)
        else:
            sys.path.append(str(trl))  # last: what it needs is taken from the environment
            own = student_config(recipe).model_copy(update={"path": str(out / "trl-student")})
            train_with_trl(recipe.with_values(student=own), out / "trl", documents)
        return
    if not (trl / "trl").is_dir():
        raise typer.BadParameter(
            f"{trl} holds no TRL: .venv/bin/python -m pip install --no-deps --target {trl} trl==1.16.0"
        )
    with TemporaryDirectory() as folder:
        recipe = trainer_recipe(dump, Path(folder), "sft", tokens, documents)
        equal_documents(dump, Path(folder) / "dump", student_tokenizer(student_config(recipe)).tokenizer, tokens)
        shared = ["--trl", str(trl), "--tokens", str(tokens), "--documents", str(documents), "--out", folder]
        names = {"trl": "TRL's SFTTrainer", **{name: f"ours, {name}" for name in OURS}}
        arguments = {names[name]: ["--worker", name, *shared] for name in trainer or names}
        compare("tests.bench.trl_sft", arguments, rounds, tokens * documents, save)


if __name__ == "__main__":
    typer.run(main)
