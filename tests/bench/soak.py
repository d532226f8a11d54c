"""Every long command for hours, side by side: are memory, open files, threads and rate stable?

    .venv/bin/python -m tests.bench.soak [--hours 2] [--engine vllm] [--commands teacher,student] [--out runs/soak]

A dump with the teacher's tokens, reduced in vLLM's worker and written by a process of its own while the engine runs on;
a training run of two ranks that deal the reading, with an objective on tokens; text by the teacher; rounds, whose every
command is started anew. Tiny models, so that as many documents, shards, steps, checkpoints and evaluations go by in an
hour as else in days: what grows with each of them shows. A sample every 20 seconds: each command's whole process tree
(memory that is its own, open files, threads, CPU time) and what it says at its own metrics endpoint. Beside each sample
a fixed piece of work is timed; rates are per CPU second, over the rate of that work, for a machine drifts, and only of
stretches in which the command had a tenth of a core at least. All commands end by SIGTERM, and must say so; what they
leave in shared memory and in the folder for temporary files is named. Trends are least squares over all samples after
the first tenth, with 95 % intervals from ten blocks of time (neighbouring samples are not independent).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import psutil
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeline.runtime.child_processes import end_children_with_me
from tests.support.ascii_models import ascii_model
from tests.support.tiny import END_OF_TEXT, tiny_tokenizer

EVERY = 20.0  # seconds between samples
WORDS = ["the", "thing", "and", "another", "in", "an", "é", "other", "number", "then", "thin", "ring", "band", "there"]
PROGRESS = {"teacher": "bld_text_bytes_total", "student": "bld_train_step", "generate": "bld_text_bytes_total"}
ROUNDS_DONE = "rounds done"  # `bld round` has no metrics of its own
BLOCKS = 10
MIN_SHARE = 0.1  # of a core: figures of a command starved by other work describe that work
STUDENT_T_8 = 2.306  # 97.5 % of Student's t with BLOCKS - 2 degrees of freedom


class Sample(NamedTuple):
    """One look at one command."""

    seconds: float  # since it was started
    memory_bytes: int  # of its own: private pages, all processes
    open_files: int
    threads: int
    cpu_seconds: float
    progress: float  # bytes of text dumped, or steps
    control_seconds: float  # CPU time of the fixed piece of work


def write_corpus(path: Path, num_bytes: int) -> None:
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            words = drawn.choices(WORDS, k=drawn.randrange(5, 150))
            file.write(json.dumps({"text": " ".join(words) + f" {drawn.random()}"}) + "\n")


def write_recipes(out: Path, engine: str, num_bytes: int) -> dict[str, Path]:
    """Write the recipes: `short`, the dump the student learns from, and for each command one without end."""
    ascii_model(out / "teacher_model", tiny_tokenizer(), END_OF_TEXT)  # what it writes is text
    student_tokenizer = tiny_tokenizer(["a n", "an d", "Ġ and", "t h", "th e"])
    ascii_model(out / "student_model", student_tokenizer, END_OF_TEXT, seed=1)
    write_corpus(out / "corpus.jsonl", num_bytes)
    teacher = {
        "model": str(out / "teacher_model"), "engine": engine, "dtype": "float32",
        "max_tokens": 256, "overlap_tokens": 32,
        "start": END_OF_TEXT, "end": [END_OF_TEXT],
    }  # fmt: skip
    student = {"model": str(out / "student_model"), "start": END_OF_TEXT, "end": END_OF_TEXT}
    train = {
        "batch_tokens": 512, "micro_batch_tokens": 256, "max_tokens": 256, "lr": 1e-5, "dtype": "float32",
        "num_processes": 2, "objectives": {"ce": 0.3, "kl": 1.0, "strict_kl": 0.3},
    }  # fmt: skip
    often = {"steps": 10**7, "save_every": 500, "eval_every": 250, "eval_documents": 4, "log_every": 10}
    corpus = {"source": str(out / "corpus.jsonl")}
    stored = {"shard_bytes": 65536, "tokens": {"top_k": 4}}
    made = {"teacher": teacher, "placement": {"writers": 1, "overlap": True}}
    held_out = {"eval": corpus | {"limit": 20, "skip": 2000}}
    prompts = corpus | {"max_bytes": 60}
    written = {"max_new_tokens": 32, "max_prompt_tokens": 200, "shard_prompts": 64}
    short = made | {"corpus": corpus | {"limit": 2000}, "dump": stored | {"path": str(out / "short")}}
    recipes = {
        "short": short,
        "teacher": made | {"corpus": corpus, "dump": stored | {"path": str(out / "dump")}},
        "student": short | held_out | {"student": student | {"path": str(out / "run")}, "train": train | often},
        "generate": made
        | {"corpus": corpus, "dump": stored | {"path": str(out / "unused")}}
        | {"generate": written | {"path": str(out / "text"), "prompts": prompts | {"limit": 200_000}}},
        "round": short
        | held_out
        | {
            "student": student | {"path": str(out / "round_run")},
            "train": train | {"num_processes": 1},
            "generate": written | {"path": "unused", "prompts": prompts | {"limit": 32}},
            "rounds": {"path": str(out / "rounds"), "count": 10**5, "steps": 2, "cold_start": True, "replay": 0.25}
            | {"max_regression": 100.0, "next_prompts": True},
        },
    }
    for name, recipe in recipes.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return {name: out / f"{name}.yaml" for name in recipes}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def fixed_work() -> float:
    """Measure the CPU seconds of a fixed piece of work: products, memory, Python."""
    started = time.thread_time()
    a = np.linspace(0, 1, 300 * 300, dtype=np.float32).reshape(300, 300)
    for _ in range(10):
        a = np.tanh(a @ a.T)
    sum(i * i for i in range(300_000))
    np.sort(np.random.default_rng(0).random(500_000))
    return time.thread_time() - started


def asked(name: str, port: int) -> Callable[[], float | None]:
    """Return a function that reads the command's own figures; None while it does not serve them yet."""

    def figure() -> float | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except OSError:
            return None
        values = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
        return values.get(PROGRESS[name])

    return figure


class Command:
    """A `bld` command under watch."""

    def __init__(self, name: str, recipe: Path, out: Path) -> None:
        port = free_port()
        self.name, self.log = name, out / f"{name}.log"
        self._progress: Callable[[], float | None] = asked(name, port)
        if name == "round":
            self._progress = lambda: float(len(list((out / "rounds").glob("round-*/round.json"))))
        self.samples: list[Sample] = []
        self._file = (out / f"{name}.jsonl").open("w", encoding="utf-8")
        self._cpu: dict[int, float] = {}  # of each process so far: what has ended must still be counted
        self._started = time.monotonic()
        with self.log.open("w", encoding="utf-8") as log:
            metrics = ["--metrics", str(port)] if name in PROGRESS else []
            command = [sys.executable, "-m", "pipeline", name, str(recipe), *metrics]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def look(self) -> None:
        """Take a sample. Raises RuntimeError if the command has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}; see {self.log}")
        root = psutil.Process(self.process.pid)
        memory = files = threads = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                with process.oneshot():
                    memory += process.memory_full_info().uss
                    files += process.num_fds()
                    threads += process.num_threads()
                    self._cpu[process.pid] = sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue  # ended while we looked
        progress = self._progress()
        if progress is None:
            return
        found = Sample(
            time.monotonic() - self._started, memory, files, threads, sum(self._cpu.values()), progress, fixed_work()
        )
        self.samples.append(found)
        print(json.dumps(found._asdict()), file=self._file, flush=True)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=600)


class Trend(NamedTuple):
    """A least-squares line: its middle, its slope per hour, and half of the slope's 95 % interval."""

    middle: float
    slope: float
    margin: float


def trend(hours: np.ndarray, values: np.ndarray) -> Trend:
    """Fit a line to the means of `BLOCKS` stretches of equal length."""
    x = np.array([block.mean() for block in np.array_split(hours, BLOCKS)])
    y = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    slope, start = np.polyfit(x, y, 1)
    residual = y - (slope * x + start)
    error = np.sqrt((residual**2).sum() / (BLOCKS - 2) / ((x - x.mean()) ** 2).sum())
    return Trend(float(y.mean()), float(slope), float(STUDENT_T_8 * error))


def trends(samples: Sequence[Sample]) -> dict[str, Trend]:
    """Compute the trends. Raises ValueError if there are too few samples."""
    settled = samples[len(samples) // 10 :]
    if len(settled) < 2 * BLOCKS:
        raise ValueError(f"{len(settled)} samples after the first tenth; {2 * BLOCKS} are needed: give more --hours")
    columns = {name: np.array([getattr(s, name) for s in settled]) for name in Sample._fields}
    hours = columns["seconds"] / 3600
    cpu_seconds = np.diff(columns["cpu_seconds"])
    ran = cpu_seconds >= MIN_SHARE * np.diff(columns["seconds"])
    rate = np.diff(columns["progress"])[ran] / cpu_seconds[ran]
    own_pace = rate * columns["control_seconds"][1:][ran]  # of the machine's speed at that moment nothing is left
    return {
        "memory, MiB": trend(hours, columns["memory_bytes"] / 2**20),
        "open files": trend(hours, columns["open_files"]),
        "threads": trend(hours, columns["threads"]),
        f"work per CPU second ({ran.mean():.0%} of the samples)": trend(hours[1:][ran], rate),
        "the same over the control's rate": trend(hours[1:][ran], own_pace / own_pace.mean()),
    }


def report(name: str, samples: Sequence[Sample]) -> None:
    last = samples[-1]
    unit = PROGRESS.get(name, ROUNDS_DONE)
    print(f"\n{name}: {len(samples)} samples in {last.seconds / 3600:.2f} h, {last.progress:,.0f} {unit}")
    print("| figure | mean | slope an hour | 95 % |")
    print("| --- | --- | --- | --- |")
    for figure, found in trends(samples).items():
        print(f"| {figure} | {found.middle:,.4g} | {found.slope:+,.4g} | ± {found.margin:,.3g} |")


def read_samples(path: Path) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def temporary_files() -> set[Path]:
    """List what lies in shared memory and in the folder for temporary files."""
    return {path for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).iterdir()}


def soak(hours: float, engine: str, out: Path, megabytes: int, names: Sequence[str]) -> dict[str, int]:
    """Run the commands for that long; return their exit codes."""
    out.mkdir(parents=True)
    recipes = write_recipes(out, engine, megabytes * 10**6)
    subprocess.run([sys.executable, "-m", "pipeline", "teacher", str(recipes["short"])], check=True)
    before = temporary_files()
    commands = [Command(name, recipes[name], out) for name in names]
    end = time.monotonic() + 3600 * hours
    codes: dict[str, int] = {}
    try:
        while time.monotonic() < end:
            time.sleep(EVERY)
            for command in commands:
                command.look()
    finally:
        codes |= {command.name: command.stop() for command in commands if command.process.poll() is None}
    print(f"left behind: {sorted(map(str, temporary_files() - before))}")
    return codes


def main(
    hours: float = 2.0,
    engine: Annotated[str, typer.Option(help="Of the dump: vllm or transformers.")] = "vllm",
    out: Path = Path("runs/soak"),
    megabytes: Annotated[int, typer.Option(help="Of the corpus; more than the dump gets through.")] = 300,
    commands: Annotated[str, typer.Option(help="Which, by comma.")] = "teacher,student,generate,round",
    again: Annotated[bool, typer.Option(help="Only report what lies in --out.")] = False,
) -> None:
    """Soak, then say what grew."""
    end_children_with_me()
    names = commands.split(",")
    if not again:
        codes: dict[str, Any] = soak(hours, engine, out, megabytes, names)
        print(f"exit codes after SIGTERM: {codes} (143 expected)")
    for name in names:
        report(name, read_samples(out / f"{name}.jsonl"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
