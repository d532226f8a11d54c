"""The training loop: data, loss, backward, step, state."""

import contextlib
import gc
import math
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Recipe, student_config
from pipeline.runtime.log import info
from stage2_student.data.batch_plan import UnionPosition
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.data.prefetch import prefetched
from stage2_student.data.token_counts import Lengths
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.runs import retention
from stage2_student.runs.checkpoint_store import CheckpointCopies
from stage2_student.runs.checkpoints import checkpoint_name, commit_checkpoint
from stage2_student.runs.step_log import RunLog
from stage2_student.training.learning_rate import learning_rate
from stage2_student.training.patience import is_exhausted
from stage2_student.training.rank_batches import BatchBuilder
from stage2_student.training.state import State
from stage2_student.training.step import Ranks, StepPlan, take_step
from stage2_student.training.stop_signals import Stopped, StopRequest
from stage2_student.training.watching import Watched
from stage2_student.training.weight_average import WeightAverage


def run_steps(
    engine: Any, state: State, builder: BatchBuilder, lengths: Sequence[Lengths], watched: Watched, ranks: Ranks
) -> tuple[State, dict[str, float]]:
    """Take the remaining steps. Returns the last state and the last step's figures.

    Raises Stopped after a signal, once a checkpoint is written.
    """
    recipe = builder.recipe
    config, run = recipe.train, Path(student_config(recipe).path)
    first_step, figures = state.step, dict[str, float]()
    steps_ahead = prefetched(builder.steps(lengths, state.position), config.prefetch)
    log_of_rank_0 = RunLog(run, first_step, recipe) if ranks.rank == 0 else contextlib.nullcontext()
    copies = CheckpointCopies(run, config.checkpoints if ranks.rank == 0 else None, config.keep_last)
    with start_frozen(), StopRequest() as stop, log_of_rank_0 as log, copies, steps_ahead as steps:
        ranks.channel.gather()  # rank 0 has opened its trackers, some of which contact a server
        while state.step < config.steps and not is_exhausted(state.progress, config.patience):
            started = time.monotonic()
            batch, micro_batches = next(steps)
            waited = time.monotonic() - started
            bytes_of_corpora = _supervised_bytes(micro_batches, len(lengths), ranks)
            num_bytes = sum(bytes_of_corpora)
            plan = StepPlan(
                step=state.step + 1,
                lr=learning_rate(state.step, config),
                seed=(config.seed * 1_000_003 + state.step) * 4096 + ranks.rank,
                num_bytes=num_bytes,
                interface_alone=state.step < config.interface_warmup_steps,
                num_corpora=len(lengths),
            )
            done = take_step(engine, micro_batches, plan, state.loss_scale, ranks)
            state = state.after_batch(batch, num_bytes, done.scale)
            figures = _all_loss_figures(
                engine.module.sums_names, ds.sum_over_ranks(done.sums), bytes_of_corpora, builder
            )
            figures |= _machine_figures(batch.num_tokens, time.monotonic() - started, waited, ranks.device)
            figures |= {"lr": plan.lr, "grad_norm": done.grad_norm, "epoch": state.position.epoch}
            figures["supervised_bytes"] = state.num_bytes
            if isinstance(state.position, UnionPosition):
                for member, position in zip(builder.sources.members, state.position.of_corpora, strict=True):
                    figures[f"epoch/{member.name}"] = position.epoch
            if done.scale is not None:
                figures["loss_scale"] = done.scale.factor
            if watched.average is not None:
                watched.average.update(state.step)
            last = state.step == config.steps
            saving = state.step % config.save_every == 0 or last
            evaluation = None
            if watched.held is not None and (saving or state.step % config.eval_every == 0):
                evaluation = watched.evaluation(engine, ranks.device)
                figures["eval_bits_per_byte"] = evaluation.bits_per_byte
                for name, bits in (evaluation.by_text or {}).items():
                    figures[f"eval_bits_per_byte/{name}"] = bits
                state = state.after_evaluation(evaluation)
                last |= is_exhausted(state.progress, config.patience)
            asked = config.tasks is not None and (state.step % config.tasks.every == 0 or last)
            if asked:
                figures |= watched.task_figures(engine, state.step, ranks)
            if log is not None and (state.step % config.log_every == 0 or last or asked or evaluation is not None):
                log.write(state.step, figures)
            if watched.samples is not None and watched.samples.is_due(state.step, last):
                watched.write_samples(engine, state.step, run, ranks)
            signal_number = ds.all_reduce_max(stop.received, ranks.device)
            if saving or last or signal_number:
                _save(engine, recipe, state, ranks, evaluation, watched.average)
                copies.add(state.step)
            if signal_number and not last:
                _log_stopped(state, run, signal_number, ranks)
                raise Stopped(signal_number)
    return state, figures


@contextlib.contextmanager
def start_frozen() -> Iterator[None]:
    """Keep the garbage collector from what was made before.

    Imports and models leave a million objects. To search them all took a quarter of a second, now and then, at another
    step of each rank, while all others waited.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _supervised_bytes(micro_batches: Sequence[MicroBatch], num_corpora: int, ranks: Ranks) -> list[int]:
    """Count the step's supervised bytes of each corpus over all ranks.

    Raises ValueError, naming the documents, if there are none at all.
    """
    of_rank = torch.zeros(num_corpora, dtype=torch.int64, device=ranks.device)
    for micro in micro_batches:
        of_rank[micro.corpus] += micro.num_bytes
    num_bytes: list[int] = ds.sum_over_ranks(of_rank).tolist()
    if not any(num_bytes):
        doc_ids_by_rank = ds.all_gather_objects([name for micro in micro_batches for name in micro.doc_ids])
        names = ", ".join(name for doc_ids in doc_ids_by_rank for name in doc_ids)
        raise ValueError(f"no byte is supervised in documents {names}: all of the student's tokens straddle segments")
    return num_bytes


def _all_loss_figures(
    names: Sequence[str], sums: torch.Tensor, num_bytes: Sequence[int], builder: BatchBuilder
) -> dict[str, float]:
    """Return `_loss_figures` of the step, and of each corpus of a union that it has bytes of, as `loss/NAME`.

    Args:
        sums: a row for each corpus, a column for each name.
        num_bytes: supervised, of each corpus.
    """
    total, recipe = sum(num_bytes), builder.recipe
    figures = _loss_figures(dict(zip(names, sums.sum(0).tolist(), strict=True)), total, recipe)
    for member, own, own_bytes in zip(builder.sources.members, sums.tolist(), num_bytes, strict=True):
        if member.name is not None and own_bytes:
            of_corpus = _loss_figures(dict(zip(names, own, strict=True)), own_bytes, recipe)
            figures |= {f"{key}/{member.name}": value for key, value in of_corpus.items()}
        if member.name is not None:
            figures[f"bytes_share/{member.name}"] = own_bytes / total
    return figures


def _loss_figures(sums: Mapping[str, float], num_bytes: int, recipe: Recipe) -> dict[str, float]:
    """Return the loss and its parts per supervised byte; parts that were not computed are absent.

    `bits_per_byte` is that of the student's own tokens, with END included in the nats. `uncounted_share` is the share
    of positions that the interface masks, `kl_share` of those that contribute KL.
    """
    weights = recipe.train.objectives.weights
    parts = {name: sums[name] / num_bytes for name in weights if name in sums}
    figures = {"loss": sum(weights[name] * value for name, value in parts.items()), **parts}
    if "ce" in parts:
        figures["bits_per_byte"] = parts["ce"] / math.log(2)
    if "positions" in sums:
        figures["uncounted_share"] = sums["uncounted"] / sums["positions"]
        figures["kl_share"] = sums["kl_positions"] / sums["positions"]
    return figures


def _machine_figures(num_tokens: int, seconds: float, waited: float, device: torch.device) -> dict[str, float]:
    memory = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "tokens_per_second": num_tokens / seconds,
        "data_wait_share": waited / seconds,
        "memory_bytes": memory,
    }


def _save(
    engine: Any,
    recipe: Recipe,
    state: State,
    ranks: Ranks,
    evaluation: retention.Evaluation | None,
    average: WeightAverage | None,
) -> None:
    run, partial = Path(student_config(recipe).path), f"{checkpoint_name(state.step)}.partial"
    ds.save(engine, run / "checkpoints", partial, {"state": state.as_dict()})
    if ranks.rank == 0:
        if average is not None:
            average.save(run / "checkpoints" / partial)
        if evaluation is not None:
            retention.record(run, partial, evaluation)
        commit_checkpoint(run, partial, state.step, ranks.world)
        retention.prune(run, recipe.train.keep_last)
    ranks.channel.gather()  # a rank that exits has its launcher end the others: not before the checkpoint is renamed


def _log_stopped(state: State, run: Path, signal_number: int, ranks: Ranks) -> None:
    if ranks.rank == 0:
        name = signal.Signals(signal_number).name
        info(
            f"{name}: stopped after step {state.step}, with a checkpoint in {run / 'checkpoints'}. "
            "Rerun the same command to continue from there"
        )
