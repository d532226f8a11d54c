"""A training run, from its folder to its export. To be run under the DeepSpeed launcher:

    python -m stage2_student.training.train --recipe FILE

Rerunning the same command resumes from the newest complete checkpoint. Randomness (dropout) is seeded at each step from
seed, step and rank, so there is no generator state to store: step and data position are the whole state.
"""

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Recipe, student_config
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.runtime import log, metrics
from pipeline.runtime.dtypes import slow_dtype
from pipeline.runtime.format import count_of
from pipeline.runtime.log import info, warning
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas import dump_files
from schemas.manifest import write_json
from stage2_student.acceleration.attention import check_model_has, use_attention
from stage2_student.acceleration.compilation import compile_trunk
from stage2_student.acceleration.eight_bit import check_can_convert, make_optimizer
from stage2_student.acceleration.four_bit import quantize_base
from stage2_student.acceleration.marginal_kernel import use_marginal_kernel
from stage2_student.acceleration.options import check_options
from stage2_student.data.contents.join_table import Keep
from stage2_student.data.order import Position
from stage2_student.data.packing import resolve_packing
from stage2_student.data.token_counts import Lengths
from stage2_student.data.union import Member, open_members, overlaps
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.distributed.dealt_reading import DealtReading
from stage2_student.distributed.deepspeed_config import deepspeed_config
from stage2_student.distributed.launcher_watch import end_with_ancestors
from stage2_student.distributed.rank_messages import Channel, LostRankError, join
from stage2_student.evaluation.watched_tasks import WatchedTasks
from stage2_student.model.context_length import sized
from stage2_student.model.initial_student import end_tokens, export_start, student_tokenizer
from stage2_student.model.parameter_groups import parameter_groups
from stage2_student.model.tokenizer_folder import read_tokenizer
from stage2_student.runs import folder, resume
from stage2_student.runs.begun import as_begun
from stage2_student.runs.checkpoint_store import fetch
from stage2_student.runs.checkpoints import checkpoint_steps, remove_partial_checkpoints
from stage2_student.runs.dump_tokens import check_tokens
from stage2_student.runs.export import export, is_due
from stage2_student.runs.identity import dumps_by_corpus
from stage2_student.runs.step_log import METRICS, cut_lines, where_to_look
from stage2_student.runs.trackers import check_installed
from stage2_student.training.building.partitioned import as_on_rank_0, reads_weights
from stage2_student.training.building.student import build_student
from stage2_student.training.held_out import held_out
from stage2_student.training.loop import run_steps
from stage2_student.training.loss_scale import first_scale
from stage2_student.training.rank_batches import BatchBuilder, Sources
from stage2_student.training.samples import FILE as SAMPLES
from stage2_student.training.samples import Samples
from stage2_student.training.state import State
from stage2_student.training.step import Ranks
from stage2_student.training.stop_signals import Stopped
from stage2_student.training.usable import counted_lengths, identity_of
from stage2_student.training.watching import Watched
from stage2_student.training.weight_average import WeightAverage


def main(arguments: list[str] | None = None) -> None:
    """Run as the launcher starts it, once per rank; exits with `run_rank`'s status."""
    parser = argparse.ArgumentParser(description="Train a student from a dump; see `bld student`.")
    parser.add_argument("--recipe", required=True, help="YAML file.")
    parser.add_argument("--local_rank", type=int, help="Given by the launcher; not used.")
    recipe = Path(parser.parse_args(arguments).recipe)
    try:
        loaded = load_recipe(recipe)
        end_with_ancestors(over_ssh=loaded.train.hostfile is not None)
        raise SystemExit(run_rank(loaded))
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        message = _user_message(error, recipe)
        if message is None or log.shows_tracebacks():
            raise
        log.error(message)
        raise SystemExit(1) from None


def _user_message(error: Exception, recipe: Path) -> str | None:
    """Format an error that a user can cause, as `bld` itself does; None for any other."""
    if not isinstance(error, RuntimeError):
        return str(error)
    # torch has a class only for memory that its GPU allocator could not get.
    if not any(phrase in str(error) for phrase in ("out of memory", "_ALLOC_FAILED", "can't allocate memory")):
        return None
    train = load_recipe(recipe).train
    checkpointing = "" if train.gradient_checkpointing else ", or set train.gradient_checkpointing: true"
    return (
        f"out of memory: {str(error).splitlines()[0]}. Lower train.micro_batch_tokens ({train.micro_batch_tokens})"
        f"{checkpointing}: the same command then continues from the newest checkpoint, if there is one. A new run can "
        f"also set train.deepspeed.zero_stage ({train.deepspeed.zero_stage}), with more ranks, and student.lora_rank; "
        "`bld plan --calibrate` counts what a run holds"
    )


def run_rank(recipe: Recipe) -> int:
    """Train as the rank that this process was started as.

    Returns the exit code: 0, or 130 or 143 if a signal stopped the run.
    """
    code = 0
    try:
        train(recipe)
    except Stopped as stopped:
        code = stopped.exit_code
    ds.leave_at_exit()
    return code


def train(recipe: Recipe) -> None:
    """Train, or resume; then export.

    Raises:
        ValueError: dump, recipe or tokenizer differ from those that the run began with.
        Stopped: a signal was received; a checkpoint is written.
        LostRankError: another rank has ended.
    """
    channel = join()
    try:
        _train_and_export(recipe, channel)
    except Stopped:
        raise
    except BaseException as error:
        lost = channel.loss(2.0) if isinstance(error, RuntimeError) else None
        channel.fail(error)
        if lost is not None:  # a collective fails when a rank of it ends
            raise LostRankError(lost) from error
        raise


def _train_and_export(recipe: Recipe, channel: Channel) -> None:
    recipe, remark = sized(recipe)
    student = student_config(recipe)
    run = Path(student.path)
    with contextlib.ExitStack() as stack:
        fetched = None
        if channel.rank == 0:
            stack.enter_context(folder.lock(run))
            fetched = fetch(recipe)
        channel.gather()  # what the run began with may have come from its store
        _train_begun(recipe, channel, [line for line in (remark, fetched) if line is not None])


def _train_begun(recipe: Recipe, channel: Channel, remarks_on_run: Sequence[str]) -> None:
    recipe, remarks_on_begun = as_begun(recipe)
    student = student_config(recipe)
    run = Path(student.path)
    members = _opened(recipe, channel)
    check_tokens(recipe, [member.reader.manifest for member in members])
    with_chats = [member.reader.manifest.has_chats for member in members]
    tokenizer, chat, _ = student_tokenizer(student, any(with_chats))
    ids = end_tokens(student, tokenizer, chat)
    if not all(with_chats):
        _check_one_end(end_tokens(student, tokenizer), ids, tokenizer)
    sources = Sources(members, tokenizer, chat, ids)
    with contextlib.ExitStack() as stack:
        if channel.rank == 0:
            stack.enter_context(metrics.served())
            for line in (*remarks_on_run, *remarks_on_begun):
                info(f"{run}: {line}")
            _prepare(recipe, sources, channel.world)
        channel.gather()  # rank 0 has made the start model, which may take longer than a collective's timeout
        checkpoint = resume.newest_sound(run, channel)
        has_ended = checkpoint is not None and checkpoint.step == recipe.train.steps
        chosen = False
        if not has_ended:
            chosen = _train(recipe, sources, channel, checkpoint)
        elif channel.rank == 0:
            info(f"{run} has done its {count_of(recipe.train.steps, 'step')}; nothing to train")
        if channel.rank == 0:
            if not has_ended or is_due(run):  # an export made during the run is not the trained model
                export(run, best=chosen)
            print(where_to_look(run), flush=True)
        channel.gather()  # no rank exits before the export is written: the launcher might then end rank 0


def _opened(recipe: Recipe, channel: Channel) -> tuple[Member, ...]:
    """Open the dumps; what joins several of one corpus is made by rank 0, once, and mapped by all."""
    student = student_config(recipe)
    how = dumps_by_corpus(recipe), student.mix, recipe.train.seed
    keep = Keep(Path(student.path) / "joined", makes=channel.rank == 0)
    if channel.rank == 0:
        members = open_members(*how, keep)
        channel.gather()
        return members
    channel.gather()
    return open_members(*how, keep)


def _check_one_end(of_documents: SpecialIds, of_turns: SpecialIds, tokenizer: ByteTokenizer) -> None:
    """Raise ValueError if documents of plain text end with another token than the turns of chats beside them."""
    if of_documents.end != of_turns.end:
        names = {number: name for name, number in tokenizer.control.items()}
        document, turn = names.get(of_documents.end), names.get(of_turns.end)
        raise ValueError(
            f"student.dumps has chats, whose turns end with {turn} in the student's template, and plain text, whose "
            f"documents end with {document}: END would be two tokens. Set student.end: {turn}, so that documents end "
            "with it, too"
        )


def _prepare(recipe: Recipe, sources: Sources, world: int) -> None:
    """Prepare the run on rank 0: claim its folder, write recipe and configuration, make the start model."""
    run = Path(student_config(recipe).path)
    check_installed(recipe.train)
    check_options(recipe.train, student_config(recipe))
    check_model_has(recipe.train, resolve_model(student_config(recipe).source))
    if slow := slow_dtype("train.dtype", recipe.train.dtype):
        warning(slow)
    for remark in sources.tokenizer.remarks():
        info(f"{run}: the student's tokenizer {remark}")
    for member in sources.members:
        for remark, count in member.reader.remarks.items():
            info(f"{run}: {count_of(count, 'document')} {remark}")
    try:
        folder.claim(run, identity_of(recipe, sources), recipe.train.change)
    except ValueError as error:
        if recipe.train.checkpoints is None:
            raise
        raise ValueError(f"{error} So does {recipe.train.checkpoints} (train.checkpoints): give another") from error
    if not checkpoint_steps(run):
        for line in overlaps(sources.members):
            warning(f"{run}: {line}")
    remove_partial_checkpoints(run)
    save_recipe(recipe, run / dump_files.RECIPE)
    write_json(run / "deepspeed.json", deepspeed_config(recipe, world))
    export_start(recipe, chats=sources.chat is not None)


def _train(recipe: Recipe, sources: Sources, channel: Channel, checkpoint: resume.Checkpoint | None) -> bool:
    """Take the remaining steps; returns whether the run ended early, with a best checkpoint before its last."""
    config, run = recipe.train, Path(student_config(recipe).path)
    _, tokenizer, chat, ids = sources
    lengths = counted_lengths(recipe, sources, channel)
    held = held_out(recipe, tokenizer, chat, ids.document_start, channel)
    torch.manual_seed(config.seed)
    whole = reads_weights(config, channel.rank)
    student = build_student(recipe, tokenizer, ids, [member.reader.manifest for member in sources.members], whole)
    for line in student.remarks if channel.rank == 0 else ():
        warning(f"{run}: {line}")
    kernel = use_marginal_kernel(student.interface, config)
    if kernel is not None and channel.rank == 0:
        info(f"{run}: {kernel}")
    packing, remark = config.packing, None
    if whole:
        packing, remark = resolve_packing(student.lm, config.packing, ds.own_device().type)
    if config.deepspeed.zero_stage == 3:
        packing = as_on_rank_0(student, packing, channel)
    if remark is not None and channel.rank == 0:
        info(f"{run}: {remark}")
    use_attention(student.lm, config)  # only now, because what is above computes on the CPU
    compile_trunk(student.lm, config)
    channel.gather()  # all have read the start model: from here on the ranks wait for each other in collectives
    ranks = Ranks(*ds.start_ranks(), channel)
    if config.deepspeed.zero_stage == 3:
        ds.broadcast_buffers(student, ranks.device)
    convert = resume.needs_conversion(checkpoint, config.deepspeed.zero_stage, ranks.world)
    quantize_base(student.lm, student_config(recipe), config, ranks.device)
    if convert and checkpoint is not None:
        check_can_convert(config, checkpoint.world, ranks.world)
    ds_config = deepspeed_config(recipe, ranks.world) | (ds.UNIVERSAL if convert else {})
    engine = ds.start_engine(student, ds_config, parameter_groups(student), channel.gather, make_optimizer(config))
    state = _resume(engine, recipe, ranks, checkpoint, convert)
    order = folder.data_order(run)
    placed = packing, ranks.rank, ranks.world
    dealt = DealtReading([member.reader for member in sources.members], channel) if ranks.world > 1 else None
    builder = BatchBuilder(recipe, sources, student.interface, *placed, order, dealt, student.on_tokens)
    average = WeightAverage(student.lm, config.ema) if config.ema else None
    if average is not None and checkpoint is not None:
        average.load(run / "checkpoints" / checkpoint.name)
    samples = None if config.samples is None else Samples(config.samples, tokenizer, chat, ids)
    tasks = None
    if config.tasks is not None and ranks.rank == 0:
        tokenizer_of_start = read_tokenizer(
            run / dump_files.START, folder.tokenizer_sha256(run), student_config(recipe).trust_remote_code
        )
        tasks = WatchedTasks(config.tasks, tokenizer_of_start)
    state, figures = run_steps(engine, state, builder, lengths, Watched(held, samples, tasks, average), ranks)
    ended_early = state.step < config.steps  # a signal raises
    if ranks.rank == 0 and figures:
        _summarise(recipe, state, figures, sources.members, lengths)
    if ended_early and ranks.rank == 0 and state.progress is not None:
        info(
            f"{run}: {count_of(config.patience, 'evaluation')} in a row were no better than {state.progress.best:.4f} "
            f"bits per byte; ended after step {state.step}, and the best checkpoint is exported. Train on with a "
            "larger train.patience, or 0"
        )
    return ended_early


def _resume(engine: Any, recipe: Recipe, ranks: Ranks, checkpoint: resume.Checkpoint | None, convert: bool) -> State:
    """Load the checkpoint and return its state; a new state if there is no checkpoint."""
    run = Path(student_config(recipe).path)
    if ranks.rank == 0:
        for name in (METRICS, SAMPLES):
            cut_lines(run / name, 0 if checkpoint is None else checkpoint.step)
    if checkpoint is None:
        return State(loss_scale=first_scale(recipe.train.dtype))
    state = State.from_dict(resume.load(engine, run, checkpoint, ranks.channel, convert)["state"])
    if folder.has_other_data(run, checkpoint.step):
        state = state.in_next_epoch(len(dumps_by_corpus(recipe)))
    if ranks.rank == 0:
        at = state.position
        record = f", record {at.record}" if isinstance(at, Position) else ""
        info(f"resuming after step {state.step}, epoch {at.epoch}{record}")
    return state


def _summarise(
    recipe: Recipe, state: State, figures: dict[str, float], members: Sequence[Member], lengths: Sequence[Lengths]
) -> None:
    run, num_steps = Path(student_config(recipe).path), recipe.train.steps
    turns: dict[str, dict[str, int]] = {}
    for reason, num_turns, num_bytes in (left for counts in lengths for left in counts.turns_left_out.values()):
        total = turns.setdefault(reason, {"turns": 0, "bytes": 0})
        total["turns"] += num_turns
        total["bytes"] += num_bytes
    transfer = json.loads((run / dump_files.START / dump_files.TRANSFER).read_text(encoding="utf-8"))
    of_dumps = {remark: count for member in members for remark, count in member.reader.remarks.items()}
    results = {"transfer": transfer, "last_step": figures, "dumps": of_dumps, "turns_left_out": turns}
    ended = {"ended_early": True} if state.step < num_steps else {}
    write_json(run / dump_files.SUMMARY, {**state.as_dict(), **results, **ended})
    for reason, count in state.left_out.items():
        warning(f"left out: {count_of(count, 'record')}, {reason}")


if __name__ == "__main__":
    main()
