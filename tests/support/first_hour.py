"""The first hour of a new operator, command by command, as text: what stands on the screen.

    python -m tests.support.first_hour

writes `tests/scenarios/first_hour.txt` anew; the test compares it with what the commands print now. What takes longer
(kills, a second student, two teachers, rounds, Ray) is `tests.bench.first_hour`, which keeps its screen beside this
one. Times, rates and figures of the tiny random models are `#`. Commands run in one process: of the hour also the
training, as a rank that torchrun started; of the rest it is launched.
"""

import contextlib
import difflib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
KEPT = {name: ROOT / f"tests/scenarios/{name}.txt" for name in ("first_hour", "first_hour_longer")}
RECIPE = """
corpus: {source: text.jsonl}
teacher: {model: teacher, engine: transformers, dtype: float32, max_tokens: 64, overlap_tokens: 8,
          start: "<|endoftext|>", end: ["<|endoftext|>"], license: apache-2.0}
dump: {path: dump, shard_bytes: 150B, audit_documents: 2}
student: {model: student, path: run, start: "<|endoftext|>", end: "<|endoftext|>"}
train: {steps: 4, batch_tokens: 64, micro_batch_tokens: 64, max_tokens: 64, dtype: float32, warmup_steps: 1,
        save_every: 2, log_every: 1, num_processes: 1, objectives: {ce: 0.3, kl: 1.0}}
eval: {source: held.jsonl, out_of_domain: {source: other.jsonl}}
generate: {path: written, prompts: {source: prompts.jsonl}, max_new_tokens: 8, max_prompt_tokens: 40}
rounds: {path: rounds, count: 1, steps: 2, replay: 0.25, max_regression: 100.0}
"""
CHAT_RECIPE = """
corpus: {source: chats.jsonl, field: messages}
teacher: {model: chat, engine: transformers, dtype: float32, max_tokens: 256, overlap_tokens: 8}
dump: {path: chat_dump, audit_documents: 2}
"""
LIBRARY = """
from itertools import islice

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from stage2_student.library import DistillationCollator, DumpStream, byte_distillation_loss

model = AutoModelForCausalLM.from_pretrained("run/start", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("run/start")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
collator = DistillationCollator(tokenizer, {"ce": 0.3, "kl": 1.0}, max_tokens=64, vocab_size=model.config.vocab_size)
for step, batch in enumerate(islice(DataLoader(DumpStream("dump"), batch_size=3, collate_fn=collator), 3)):
    loss = byte_distillation_loss(model(input_ids=batch["input_ids"]).logits, batch)
    loss.per_byte.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: {loss.per_byte.item():.4f} nats a byte, left out: {dict(batch['targets'].left_out)}")
"""
MEANS = "student.transfer={input: mean, output: mean}"
TWO_TEACHERS = "student.dumps=[{path: dump, weight: 1}, {path: dump2, weight: 1}]"
# Kills its rank once there is a checkpoint, once.
KILL = """
import os, signal
from pathlib import Path

def objective(inputs):
    if Path("killed/checkpoints/step-000002").exists() and not Path("was_killed").exists():
        Path("was_killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0 * inputs.nats_N.sum()
"""
SECOND = ("-o", "student.path=run2", "-o", "train.seed=1")
KILLED = ("-o", "student.path=killed", "-o", "train.objectives={ce: 0.3, kl: 1.0, kill.py: 0.1}")
Steps = tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
LOSE = "lose"  # loses a shard, as a kill does
PYTHON = "python"
# Title, and the commands under it.
HOUR: Steps = (
    ("What will it do?", (("plan", "my.yaml"),)),
    ("The teacher", (("teacher", "my.yaml"), ("teacher", "my.yaml"))),
    ("A shard is lost, and made again", ((LOSE, "dump/shards/part-00001.parquet"), ("teacher", "my.yaml"))),
    ("A text of your own", (("teacher", "my.yaml", "-o", "corpus.source=own.txt", "-o", "dump.path=own"),)),
    ("A look into the dump", (("inspect", "dump"), ("inspect", "own", "--find", "dog"), ("verify", "dump"))),
    ("Chats", (("teacher", "chat.yaml"),)),
    ("The start of a student", (("start", "my.yaml", "-o", MEANS, "-o", "student.path=other"),)),
    ("The student", (("student", "my.yaml", "-o", MEANS), ("student", "my.yaml", "-o", MEANS))),
    ("How good is it?", (("eval", "my.yaml", "-o", MEANS), ("report", "run"))),
    ("The student as a model", (("export", "run", "--out", "model"),)),
    ("To and from a hub", (("push", "dump", "me/dump"), ("pull", "me/dump", "pulled"), ("push", "run", "me/model"))),
    ("The teacher writes", (("generate", "my.yaml"), ("generate", "my.yaml"))),
    ("In Python", ((PYTHON, "library.py"),)),
    (
        "Mistakes",
        (
            ("teacher", "mine.yaml"),
            ("plan", "my.yaml", "-o", "train.stepps=3"),
            ("inspect", "dmp"),
            ("teacher", "my.yaml", "-o", "dump.top_k=4"),
            ("student", "my.yaml", "-o", MEANS, "-o", "train.lr=1"),
            ("eval", "nothing/here"),
        ),
    ),
)
LONGER: Steps = (
    ("The teacher", (("teacher", "my.yaml"),)),
    ("A student is killed, and goes on", ((("student", "my.yaml", "-o", MEANS, *KILLED),) * 2)),
    ("A student, and a second", (("student", "my.yaml", "-o", MEANS), ("student", "my.yaml", "-o", MEANS, *SECOND))),
    ("A report of both", (("report", "run", "run2"),)),
    (
        "A student with a SentencePiece tokenizer",
        (("student", "my.yaml", "-o", MEANS, "-o", "student.tokenizer=pieces.model", "-o", "student.path=pieces"),),
    ),
    (
        "Two teachers",
        (
            ("teacher", "my.yaml", "-o", "dump.path=dump2", "-o", "teacher.model=teacher2"),
            ("student", "my.yaml", "-o", MEANS, "-o", "student.path=two", "-o", TWO_TEACHERS),
        ),
    ),
    ("Rounds", (("round", "my.yaml", "-o", MEANS),)),
    ("Engines on Ray", (("teacher", "my.yaml", "-o", "dump.path=on_ray", "--ray"),)),
)
PARTS = {"first_hour": HOUR, "first_hour_longer": LONGER}


def prepare(folder: Path) -> None:
    """Write models, texts and the recipe."""
    from tests.support.ascii_models import ascii_model
    from tests.support.chats import chat, chat_model
    from tests.support.tiny import END_OF_TEXT, tiny_tokenizer

    for seed, name in enumerate(("teacher", "teacher2")):
        ascii_model(folder / name, tiny_tokenizer(), END_OF_TEXT, seed)
    chat_model(folder / "chat", "qwen")
    ascii_model(folder / "student", tiny_tokenizer(["t h", "a n"]), END_OF_TEXT, 2)
    for name, text in (("text", "the cat and the dog number {} are in the garden"), ("held", "in the garden {} sings")):
        lines = (json.dumps({"text": text.format(i)}) + "\n" for i in range(6))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.copyfile(folder / "held.jsonl", folder / "prompts.jsonl")
    (folder / "other.jsonl").write_text('{"text": "7 stones, and no thing"}\n', encoding="utf-8")
    (folder / "own.txt").write_text("The cat and the dog sing in the garden.\n", encoding="utf-8")
    chats = [chat("the thing?", "and yes", "in?", "an\nand"), chat("the", "ing", system="and so")]
    rows = (json.dumps({"messages": messages}) + "\n" for messages in chats)
    (folder / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "chat.yaml").write_text(CHAT_RECIPE, encoding="utf-8")
    (folder / "library.py").write_text(LIBRARY, encoding="utf-8")
    (folder / "kill.py").write_text(KILL, encoding="utf-8")
    (folder / "my.yaml").write_text(RECIPE, encoding="utf-8")


def transcript(part: str, timeout: float) -> str:
    """Run a part of the first hour in a new folder, and return the screen."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        if part != "first_hour":
            from tests.support.families import train_sentencepiece

            train_sentencepiece(folder / "pieces.model")
        known = {key: value for key, value in os.environ.items() if not key.startswith(("BLD_", "TQDM_", "HF_"))}
        environment = known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        environment |= {"TQDM_DISABLE": "1"}  # as a command of its own sets it where no terminal is
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"from tests.support.first_hour import run; run({part!r})"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    return normalised(done.stdout, name)


def run(part: str) -> None:
    """Run all commands in this process and the current folder; what they print follows each command."""
    from pipeline import cli

    for title, commands in PARTS[part]:
        print(f"\n## {title}", flush=True)
        for command in commands:
            is_bld = command[0] not in (LOSE, PYTHON)
            print(f"\n$ {'bld ' * is_bld}{' '.join(map(quoted, command))}", flush=True)
            if command[0] == LOSE:
                for lost in (command[1], "dump/summary.json", "dump/audit.json"):
                    Path(lost).unlink()
            elif command[0] == PYTHON:
                runpy.run_path(command[1])
            else:
                as_rank = {"TORCHELASTIC_RUN_ID": "1"} if command[0] == "student" and part == "first_hour" else {}
                with (
                    mock.patch.dict(os.environ, as_rank),
                    mock.patch("pipeline.dumps.hub._api", hub),
                    mock.patch.object(sys, "argv", ["bld", *command]),
                    contextlib.suppress(SystemExit),
                ):
                    cli.main()
            sys.stdout.flush()
            sys.stderr.flush()


def hub() -> Any:
    """Return a stand-in for a hub, of data sets or, where a run is pushed, of models."""
    from tests.pipeline.dumps.test_hub import FakeHub  # not before a command has silenced other packages

    found = FakeHub(Path("hub"))
    found.repo_type = "model" if sys.argv[2] == "run" else "dataset"
    return found


def quoted(word: str) -> str:
    return f"'{word}'" if " " in word else word


_NORMAL = (  # in this order
    (r"\d\d:\d\d:\d\d(?= bld )", "00:00:00"),
    (r"^\[20\d\d-[^]]*\] \[ERROR\] \[launch.py:.*rank.py.* (?=exits)", "[DeepSpeed's launcher] rank.py "),
    (r"(?<=[-=])\d+(\.\d+)+", "#"),  # a version
    (r"(?<![\w.-])-?\d[\d,]*(\.\d+)+(e-?\d+)?", "#"),
    (r"\b[0-9a-f]{12,64}\b", "#"),
    (r"(?<![\w.])[\d,#]+(?= ?(%|s\b|min\b|h\b|bytes/s|tokens/s|[kMGT]i?B\b|CPU cores|tokens\b|bytes\b))", "#"),
    (r"\b((?:\w+_)?bytes|seconds'?:?|positions|ended|\w+_tokens) [\d,]+", r"\1 #"),
    (r"^.* (\d+)/(?!\1 )\d+ documents, .*\n", ""),  # progress, which a fast machine does not say
    (r"(bld student: \d+/\d+) .*", r"\1 ..."),  # a step
    (r"^( \d+ \| .) .*", r"\1 ..."),  # a position
    (r"(^ \S+( [\d,]+)? #%.*\n)+", " ...\n"),  # a histogram
    (r"(?<=│ )\d+(?= │)", "#"),
    (r"[━─]+", "─"),
    (r" +$", ""),
)


def normalised(text: str, folder: str) -> str:
    """Replace what differs from run to run."""
    text = text.replace(str(Path(folder).resolve()), "FOLDER").replace(folder, "FOLDER")
    text = re.sub("[ \\t]+", " ", text)
    for pattern, by in _NORMAL:
        text = re.sub(pattern, by, text, flags=re.MULTILINE)
    return text.lstrip("\n")


def difference(part: str, timeout: float) -> str:
    """Return how the screen differs from what is kept; empty if it does not."""
    kept, now = KEPT[part].read_text(encoding="utf-8").splitlines(), transcript(part, timeout).splitlines()
    return "\n".join(difflib.unified_diff(kept, now, "kept", "now", lineterm=""))


if __name__ == "__main__":
    KEPT["first_hour"].write_text(transcript("first_hour", 3600), encoding="utf-8")
