"""Our trainer, and our loss in a loop of one's own, beside the trainers of TRL and transformers.

Same model, documents, dtype and optimizer: weights are float32, with bfloat16 autocast.

    .venv/bin/python -m pip install --no-deps --target runs/trl trl==1.16.0
    .venv/bin/python -m tests.bench.trl_sft [--trl runs/trl] [--dump runs/demo/dump] [--rounds 7]
        [--trainer sft --trainer token_marginal --trainer library --trainer transformers --trainer trl]

TRL stands in a folder of its own, and uses what `.venv` has of all else. Each trainer runs its whole loop in a process
of its own; they take turns step by step (`tests.bench.turns`). All documents have the same number of tokens, so that
nothing is padded. Ours, and `library` (`token_marginal` with `stage2_student.library` in a loop of plain PyTorch), read
and encode their batch within the step, without making any ahead; TRL and transformers are given tokens. `sft` is
cross-entropy alone, as theirs. All that are named are in memory at once, some 4 GB each; the first one is what the
others are compared with.
"""

import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from pipeline.config import Recipe, student_config
from stage2_student.data.reader import DumpReader
from stage2_student.library import DistillationCollator, DumpStream, byte_distillation_loss, token_head
from stage2_student.model.initial_student import end_tokens, export_start, load_start, student_tokenizer
from tests.bench.turns import FOREVER, Turn, compare, equal_documents, train_in_turns, trainer_recipe

NAMES = {
    "trl": "TRL's SFTTrainer",
    "sft": "ours, `sft`",
    "token_marginal": "ours, `token_marginal`",
    "library": "`token_marginal` by the library, plain PyTorch",
    "transformers": "transformers' Trainer",
}


class InTurns(TrainerCallback):
    """Callback that waits for its turn before each step of TRL's trainer."""

    def __init__(self) -> None:
        self._turn = Turn()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._turn.wait()


def token_rows(recipe: Recipe) -> list[list[int]]:
    """Return the tokens of each document, in the order of our trainer."""
    config = student_config(recipe)
    tokenizer = student_tokenizer(config).tokenizer
    first = end_tokens(config, tokenizer).start
    of_epoch = takewhile(lambda item: item[1].epoch == 0, DumpReader(Path(recipe.dump.path), 0).records())
    return [[first, *tokenizer.encode(record.document)] for record, _ in of_epoch]


def shared_arguments(recipe: Recipe, out: Path, documents: int) -> dict[str, Any]:
    """Return the settings of the trainers of TRL and transformers that our recipe decides."""
    train = recipe.train
    return {
        "output_dir": str(out),
        "max_steps": FOREVER,
        "per_device_train_batch_size": documents,
        "learning_rate": train.lr,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.grad_clip,
        "lr_scheduler_type": "cosine",
        "warmup_steps": train.warmup_steps,
        "optim": "adamw_torch",
        "bf16": train.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def train_with_trl(recipe: Recipe, out: Path, documents: int) -> None:
    """Run TRL's trainer on the same tokens.

    Defaults, except for what our recipe decides, and no checkpointing of activations.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    start = export_start(recipe)
    wrapped = AutoTokenizer.from_pretrained(start)
    wrapped.pad_token = wrapped.pad_token or wrapped.eos_token or "<|endoftext|>"
    arguments = SFTConfig(
        **shared_arguments(recipe, out, documents),
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    SFTTrainer(
        model=load_start(start, False).train(),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": token_rows(recipe)}),
        processing_class=wrapped,
        callbacks=[InTurns()],
    ).train()


def train_with_transformers(recipe: Recipe, out: Path, documents: int) -> None:
    """Run the trainer of transformers on the same tokens; defaults, except for what our recipe decides."""
    from datasets import Dataset

    rows = token_rows(recipe)
    Trainer(
        model=load_start(export_start(recipe), False).train(),
        args=TrainingArguments(**shared_arguments(recipe, out, documents)),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch"),
        callbacks=[InTurns()],
    ).train()


def train_with_library(recipe: Recipe, documents: int) -> None:
    """Run the loop of the README's plain PyTorch with our loss, on the same dump."""
    train, start = recipe.train, export_start(recipe)
    model = load_start(start, False).train()
    optimizer = torch.optim.AdamW(model.parameters(), train.lr, betas=train.betas, weight_decay=train.weight_decay)
    weights: Mapping[str, float] = {name: value for name, value in train.objectives.weights.items() if value}
    rows = model.get_output_embeddings().weight.shape[0]
    collator = DistillationCollator(
        AutoTokenizer.from_pretrained(start), dict(weights), max_tokens=train.max_tokens, vocab_size=rows
    )
    stream = DumpStream(recipe.dump.path, seed=train.seed, batch_size=documents)
    head, turn = token_head(model), Turn()
    for batch in DataLoader(stream, batch_size=documents, collate_fn=collator):
        turn.wait()
        with torch.autocast("cpu", torch.bfloat16, enabled=train.dtype == "bfloat16"):
            hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
            loss = byte_distillation_loss(hidden, batch, head).per_byte
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def main(
    trl: Annotated[Path, typer.Option(help="folder that TRL was installed to")] = Path("runs/trl"),
    dump: Annotated[Path, typer.Option(help="documents and targets to train on")] = Path("runs/demo/dump"),
    rounds: Annotated[int, typer.Option(help="timed steps of each trainer; the median counts")] = 7,
    tokens: Annotated[int, typer.Option(help="student tokens of a document")] = 512,
    documents: Annotated[int, typer.Option(help="documents of a step")] = 2,
    trainer: Annotated[list[str] | None, typer.Option(help="one or more; default: trl, sft, token_marginal")] = None,
    save: Annotated[str, typer.Option(help="Keep the table as tests/bench/results/SAVE.json.")] = "",
    worker: Annotated[str | None, typer.Option(help="be one of the trainers", hidden=True)] = None,
    out: Annotated[Path, typer.Option(help="folder of the students", hidden=True)] = Path(),
) -> None:
    if worker is not None:
        ours = worker in ("sft", "token_marginal")
        objectives = "token_marginal" if worker == "library" else worker if ours else "sft"
        recipe = trainer_recipe(out / "dump", out, objectives, tokens, documents)
        if ours:
            train_in_turns(recipe)
            return
        own = student_config(recipe).model_copy(update={"path": str(out / f"{worker}-student")})
        recipe = recipe.with_values(student=own)
        if worker == "library":
            train_with_library(recipe, documents)
        elif worker == "transformers":
            train_with_transformers(recipe, out / worker, documents)
        else:
            sys.path.append(str(trl))  # last: what it needs is taken from the environment
            train_with_trl(recipe, out / worker, documents)
        return
    chosen = trainer or ["trl", "sft", "token_marginal"]
    if unknown := set(chosen) - set(NAMES):
        raise typer.BadParameter(f"no trainer {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if "trl" in chosen and not (trl / "trl").is_dir():
        raise typer.BadParameter(
            f"{trl} holds no TRL: .venv/bin/python -m pip install --no-deps --target {trl} trl==1.16.0"
        )
    with TemporaryDirectory() as folder:
        recipe = trainer_recipe(dump, Path(folder), "sft", tokens, documents)
        equal_documents(dump, Path(folder) / "dump", student_tokenizer(student_config(recipe)).tokenizer, tokens)
        shared = ["--trl", str(trl), "--tokens", str(tokens), "--documents", str(documents), "--out", folder]
        arguments = {NAMES[name]: ["--worker", name, *shared] for name in chosen}
        compare("tests.bench.trl_sft", arguments, rounds, tokens * documents, save)


if __name__ == "__main__":
    typer.run(main)
