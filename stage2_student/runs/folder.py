"""A run's folder: whose it is, which checkpoints are complete, what has been logged.

identity.json             what decides the result; a resume that differs is refused, but for the schedule of steps to come
recipe.yaml, deepspeed.json, transfer counts in start/
lengths/                  the student's tokens of each record, by shard (see `stage2_student.data.token_counts`)
start/                    the student before its first step, a Hugging Face folder
checkpoints/step-000020   DeepSpeed's files; complete, since a checkpoint gets its name last
checkpoints/latest        the newest of them, for DeepSpeed's own tools
checkpoints/best          the best of them by evaluation (see `stage2_student.runs.retention`)
checkpoints/*.damaged     one that could not be loaded when the run was resumed
metrics.jsonl, tensorboard/, summary.json, export/
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.config import DumpRef, Recipe, student_config
from pipeline.config.identity import identity_differences, identity_values
from pipeline.runtime import plugins
from pipeline.runtime.log import warn
from schemas.manifest import Manifest, parse_json, read_json, write_json
from schemas.storage.atomic import sync_and_rename
from stage2_student.data import order
from stage2_student.data.mix import Mix
from stage2_student.distributed.deepspeed_config import decides_the_result
from stage2_student.runs import schedule
from stage2_student.runs.checkpoint_files import write_inventory

if TYPE_CHECKING:  # who only starts the ranks need not load what makes a student
    from stage2_student.model.initial_student import Ends

_WATCHING = {"save_every", "keep_last", "log_every", "eval_every", "eval_documents", "wandb"}
_DATA_PATH = {"micro_batch_tokens", "prefetch", "packing"}
_PLACEMENT = {"num_processes", "hostfile", "gradient_checkpointing", "deepspeed", *_DATA_PATH, *_WATCHING}
# Where it is, and what is told by what comes of it: the dumps' identities, ids and hashes.
_NOT_OF_STUDENT = {"path", "dumps", "mix", "start", "end", "tokenizer", "chat_template", "trust_remote_code"}
_PIECES_VERSION = 2  # of how records are cut (`stage2_student.data.pieces`), and of what is kept of their lengths
_WHOLE_CHATS_PIECES = 1  # where chats are used whole or not at all
_ADAPTERS_VERSION = 2  # of which weights have adapters; runs of earlier releases do not say one
REMEDY = "Restore that file, or give a new student.path, or delete that folder to start again"
_STEP = re.compile(r"step-(\d{6,})")


def dump_refs(recipe: Recipe) -> tuple[DumpRef, ...]:
    """The dumps to learn from, at least one."""
    return student_config(recipe).dumps or (DumpRef(path=recipe.dump.path, weight=1.0),)


def run_identity(
    recipe: Recipe,
    manifest: Manifest,
    tokenizer_sha256: str,
    ends: "Ends",
    other_manifests: Sequence[Manifest] = (),
    data_order: int = order.VERSION,
    adapters_by_peft: bool = False,
) -> dict[str, Any]:
    """Everything that decides the trained weights, but rounding; and the ZeRO stage, whose checkpoints no other stage reads."""
    student, train = student_config(recipe), recipe.train
    identity = {
        "dump": _dump_identity(manifest),
        **(_mix_identity(recipe, other_manifests) if other_manifests else {}),
        "student": {
            **identity_values(student, _NOT_OF_STUDENT),
            "tokenizer_sha256": tokenizer_sha256,
            "start_id": ends.start,
            "end_id": ends.end,
        },
        "train": identity_values(train, _PLACEMENT),
        **_own_code(student.interface, *train.objectives.files.values()),
        "data_order": data_order,
        **({"adapters": _ADAPTERS_VERSION} if student.lora_rank and not adapters_by_peft else {}),
        "deepspeed": {"zero_stage": train.deepspeed.zero_stage, **decides_the_result(train.deepspeed)},
    }
    return dict(json.loads(json.dumps(identity)))


def begun_identity(run: Path, *needed: str) -> dict[str, Any]:
    """Read the identity that the run in this folder began with. Raises ValueError, naming the file, where it is damaged."""
    return read_json(run / "identity.json", *needed, remedy=REMEDY)


def tokenizer_sha256(run: Path) -> str:
    """The `ByteTokenizer.sha256` of the student's tokenizer, as the run began."""
    return str(begun_identity(run, "student")["student"]["tokenizer_sha256"])


def data_order(run: Path) -> int:
    """The version of the order in which the run takes its documents: the one that its checkpoints were made in, where it can still be taken."""
    path = run / "identity.json"
    if not path.exists() or not checkpoint_steps(run):
        return order.VERSION
    begun = begun_identity(run).get("data_order")
    return begun if begun in order.READ else order.VERSION


def adapters_by_peft(run: Path) -> bool:
    """Whether the run's checkpoints have the adapters that earlier releases gave a model (see `stage2_student.model.lora`)."""
    path = run / "identity.json"
    begun = path.exists() and checkpoint_steps(run)
    return bool(begun) and "adapters" not in begun_identity(run)


def _dump_identity(manifest: Manifest) -> dict[str, Any]:
    plan = json.dumps([shard.model_dump() for shard in manifest.shards], sort_keys=True)
    return {**manifest.identity, "documents_sha256": hashlib.sha256(plan.encode()).hexdigest()}


def _own_code(*names: str) -> dict[str, Any]:
    """Of the operator's own files, by their content; what they import is not known."""
    files = {name: plugins.sha256(name) for name in names if plugins.is_own(name)}
    return {"own_code": files} if files else {}


def _mix_identity(recipe: Recipe, other_manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Of a student of several dumps: the others in order, and how their targets are mixed with the first one's."""
    weights = Mix.of([ref.weight for ref in dump_refs(recipe)], "arithmetic").weights
    return {
        "other_dumps": {str(index): _dump_identity(other) for index, other in enumerate(other_manifests, 1)},
        "mix": {"how": student_config(recipe).mix, "weights": {str(i): weight for i, weight in enumerate(weights)}},
    }


def counts_key(identity: Mapping[str, Any]) -> str:
    """What decides how many tokens the records of a run's dumps have, in which pieces, as a hash."""
    student = {name: identity["student"].get(name) for name in ("tokenizer_sha256", "template_sha256")}
    is_cut = identity["data_order"] > order.WHOLE_RECORDS
    version = _PIECES_VERSION if identity["data_order"] > order.WHOLE_CHATS else _WHOLE_CHATS_PIECES
    pieces = {"pieces": version, "max_tokens": identity["train"]["max_tokens"] if is_cut else None}
    decisive = {"dump": identity["dump"], "other_dumps": identity.get("other_dumps"), **student, **pieces}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def lock(run: Path) -> IO[str]:
    """Hold the run for this process, until it ends in whatever way. Raises ValueError where another holds it."""
    run.mkdir(parents=True, exist_ok=True)
    file = (run / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is training in {run}; wait for it, end it, or give another student.path"
        ) from None
    return file


def claim(run: Path, identity: dict[str, Any]) -> None:
    """Make the run's identity ours. Raises ValueError, naming the fields, where checkpoints of another one lie there.

    One that differs in the schedule alone is trained on, with a warning. Without a complete checkpoint nothing is lost, and what
    another recipe left there is removed.
    """
    path = run / "identity.json"
    theirs = begun_identity(run) if path.exists() else None
    known = {} if theirs is None else {key: value for key, value in theirs.items() if key != schedule.TRAINED_ON}
    if theirs is not None and (differences := "; ".join(identity_differences(known, identity))):
        if steps := checkpoint_steps(run):
            trained_on = schedule.replanned(theirs, identity, steps)
            if trained_on is None:
                raise ValueError(
                    f"{run} holds checkpoints of another run ({differences}). Give a new student.path, or "
                    "delete that folder to start again."
                )
            warn(
                f"{run}: trained on from step {steps[-1]} ({differences}); the rates of the steps to come are planned anew"
            )
            write_json(path, trained_on)
            return
        theirs = None
    if theirs is None:
        for name in ("start", "start.partial", "checkpoints", "tensorboard"):
            shutil.rmtree(run / name, ignore_errors=True)
        for name in ("metrics.jsonl", "wandb_id"):
            (run / name).unlink(missing_ok=True)
        write_json(path, identity)


def begun_schedule(run: Path) -> dict[str, Any]:
    """Return what a run that has a checkpoint keeps where a recipe does not say it (`schedule.KEPT`); empty where there is none."""
    path = run / "identity.json"
    if not path.exists() or not checkpoint_steps(run):
        return {}
    return schedule.begun(begun_identity(run), schedule.KEPT)


def was_passed(run: Path, step: int) -> bool:
    """Whether the run was at its end at this step, and was then trained on."""
    identity = begun_identity(run)
    return step in [time["from_step"] for time in identity.get(schedule.TRAINED_ON, [])]


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def commit_checkpoint(run: Path, partial: str, step: int, world: int) -> None:
    """List DeepSpeed's files and make them durable, then give the folder its name, then say in `latest` that it is the newest."""
    folder = run / "checkpoints"
    write_inventory(folder / partial, world)
    for file in (folder / partial).iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    (folder / partial).replace(folder / checkpoint_name(step))
    _write_latest(folder, step)


def _write_latest(folder: Path, step: int) -> None:
    latest = folder / "latest.partial"
    latest.write_text(checkpoint_name(step), encoding="utf-8")
    sync_and_rename(latest, folder / "latest")


def set_aside(run: Path, damaged: Mapping[int, str], sound: int) -> None:
    """Say which checkpoints are damaged, and why, and keep them under names that no resume looks at; `sound` is now the newest."""
    folder = run / "checkpoints"
    for step, cause in damaged.items():
        name = checkpoint_name(step)
        kept = next(
            new for n in count(1) if not (new := folder / f"{name}.damaged{'' if n == 1 else f'-{n}'}").exists()
        )
        (folder / name).replace(kept)
        warn(f"{folder / name} cannot be loaded ({cause}); kept as {kept.name}, going back to {checkpoint_name(sound)}")
    if damaged:
        _write_latest(folder, sound)


def remove_partial_checkpoints(run: Path) -> None:
    for folder in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def cut_metrics(run: Path, step: int) -> None:
    """Keep only the lines up to `step`: those after it will be written again."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    # A line that a kill left half written is the last one, and has no newline.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    partial = path.with_suffix(".partial")
    mend = "Repair or delete that line, then run the same command again"
    steps = [parse_json(text, f"{path}, line {n}", "step", remedy=mend)["step"] for n, text in enumerate(lines, 1)]
    kept = (line for line, of in zip(lines, steps, strict=True) if of <= step)
    partial.write_text("".join(kept), encoding="utf-8")
    sync_and_rename(partial, path)
