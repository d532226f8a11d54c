"""The training loop: data, loss, backward, step, state. Run under the DeepSpeed launcher:

    python -m stage2_student.train --recipe FILE

Restarting the same command resumes from the newest complete checkpoint. Randomness (dropout) is drawn anew for each
step from seed, step and rank, so there is no generator state to store: step and data position are the whole state.
"""

import argparse
import contextlib
import json
import math
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import metrics
from pipeline.chat import ChatTokenizer
from pipeline.config import Recipe
from pipeline.logs import say, warn
from pipeline.recipe import load_recipe, save_recipe
from pipeline.tokenizer_bytes import ByteTokenizer
from schemas.manifest import write_json
from stage2_student import deepspeed_engine as ds
from stage2_student import keep, resume, run_folder
from stage2_student.alm import chunk_tensors
from stage2_student.batches import (
    Masks,
    MicroBatch,
    collate,
    empty_micro_batch,
    make_example,
)
from stage2_student.deepspeed_json import deepspeed_config
from stage2_student.export import export
from stage2_student.held_out import held_out
from stage2_student.interfaces import Interface, StudentShape, make_interface
from stage2_student.log import RunLog, where_to_look
from stage2_student.lora import add_adapters
from stage2_student.loss_scale import first_scale
from stage2_student.model import PARTS, Student
from stage2_student.packing import Packing, plan_micro_batches, settle
from stage2_student.prefetch import prefetched
from stage2_student.reader import DumpReader, GlobalBatch, global_batches
from stage2_student.signals import Stopped, StopRequest
from stage2_student.start import (
    Ends,
    end_tokens,
    export_start,
    load_start,
    student_config,
    student_tokenizer,
    tokenizer_moved,
)
from stage2_student.state import State
from stage2_student.step import Ranks, StepPlan, take_step
from stage2_student.trackers import check_installed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a student from a dump; see `bld student`.")
    parser.add_argument("--recipe", required=True, help="YAML file.")
    parser.add_argument("--local_rank", type=int, help="Given by the launcher; not used.")
    raise SystemExit(run_rank(load_recipe(Path(parser.parse_args(arguments).recipe))))


def run_rank(recipe: Recipe) -> int:
    """Train as the rank that this process was started as. Returns the exit code: 130 or 143 where a signal stopped the run."""
    try:
        train(recipe)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def train(recipe: Recipe) -> None:
    """Train, or resume; then export.

    Raises ValueError for another dump, recipe or tokenizer than it began with, and Stopped for a signal, after a checkpoint.
    """
    student = student_config(recipe)
    run = Path(student.path)
    reader = DumpReader.of(run_folder.dump_refs(recipe), student.mix, recipe.train.seed)
    tokenizer, chat, _ = student_tokenizer(student, reader.manifest.has_chats)
    ends = end_tokens(student, tokenizer, chat)
    ranks = Ranks(*ds.start_ranks())
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            stack.enter_context(run_folder.lock(run))
            stack.enter_context(metrics.served())
            _prepare(recipe, reader, tokenizer, chat, ends, ranks.world)
        found = resume.newest_sound(run, ranks.rank, ranks.world)
        if found is None or found.step != recipe.train.steps:
            _loop(recipe, reader, tokenizer, chat, ends, ranks, found)
        elif ranks.rank == 0:
            say(f"{run} has done its {recipe.train.steps} steps; nothing to train")
        if ranks.rank == 0:
            if not (run / "export").exists():
                export(run)
            print(where_to_look(run), flush=True)
        ds.wait_for_all()


def _prepare(
    recipe: Recipe, reader: DumpReader, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, ends: Ends, world: int
) -> None:
    """Rank 0: claim the folder, write what the run consists of, make the start model."""
    run = Path(student_config(recipe).path)
    check_installed(recipe.train.wandb)
    for remark in tokenizer.remarks():
        say(f"{run}: the student's tokenizer {remark}")
    for remark, count in reader.remarks.items():
        say(f"{run}: {count} documents {remark}")
    identity = run_folder.run_identity(recipe, reader.manifest, tokenizer.sha256, ends, reader.other_manifests)
    if chat is not None:
        identity["student"]["template_sha256"] = chat.template.sha256
    run_folder.claim(run, identity)
    run_folder.remove_partial_checkpoints(run)
    save_recipe(recipe, run / "recipe.yaml")
    write_json(run / "deepspeed.json", deepspeed_config(recipe, world))
    export_start(recipe, chats=chat is not None)


def build_student(recipe: Recipe, tokenizer: ByteTokenizer, ends: Ends) -> Student:
    """The start model with its interface (where an objective needs one), float32, on the CPU."""
    config = student_config(recipe)
    start = Path(config.path) / "start"
    lm = load_start(start, config.trust_remote_code)
    if config.lora_rank:
        add_adapters(lm, config, tokenizer_moved(start))
    if recipe.train.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    shape = StudentShape(
        hidden_size=lm.config.get_text_config().hidden_size,
        head_rows=lm.get_output_embeddings().weight.shape[0],
        token_bytes=tokenizer.token_bytes,
        prefix=tokenizer.prefix,
        end_ids=(ends.end,),
    )
    interface = make_interface(config, shape) if recipe.train.objectives.uses_bytes else None
    if interface is not None and recipe.train.interface_warmup_steps and not any(True for _ in interface.parameters()):
        raise ValueError(
            f"train.interface_warmup_steps is {recipe.train.interface_warmup_steps}, but student.interface "
            f"{config.interface} has no parameters to warm up; set 0"
        )
    student = Student(lm, interface, recipe.train)
    student.eval()
    student.check_head()
    return student.train()


def _loop(
    recipe: Recipe,
    reader: DumpReader,
    tokenizer: ByteTokenizer,
    chat: ChatTokenizer | None,
    ends: Ends,
    ranks: Ranks,
    found: resume.Checkpoint | None,
) -> None:
    config, run = recipe.train, Path(student_config(recipe).path)
    held = held_out(recipe, tokenizer, chat, ends.start, ranks.rank, ranks.world)
    torch.manual_seed(config.seed)
    student = build_student(recipe, tokenizer, ends)
    packing, remark = settle(student.lm, config.packing, ranks.device.type)
    if remark is not None and ranks.rank == 0:
        say(f"{run}: {remark}")
    convert = resume.needs_conversion(found, config.deepspeed.zero_stage, ranks.world)
    told = deepspeed_config(recipe, ranks.world) | (ds.UNIVERSAL if convert else {})
    engine = ds.start_engine(student, told, student.rates())
    state = _resume(engine, recipe, ranks, found, convert)
    batches = global_batches(reader, tokenizer, config.batch_tokens, config.max_tokens, state.position, chat)
    shares = ((batch, list(_own_share(batch, recipe, ends, student.interface, packing, ranks))) for batch in batches)
    first_step, figures = state.step, {}
    log_of_rank_0 = RunLog(run, first_step, recipe) if ranks.rank == 0 else contextlib.nullcontext()
    with StopRequest() as stop, log_of_rank_0 as log, prefetched(shares, config.prefetch) as steps:
        while state.step < config.steps:
            started = time.monotonic()
            batch, micro_batches = next(steps)
            waited = time.monotonic() - started
            num_bytes = int(
                ds.sum_over_ranks(torch.tensor(sum(m.num_bytes for m in micro_batches), device=ranks.device))
            )
            if num_bytes == 0:
                raise ValueError(
                    f"no byte is supervised in {_names(batch)}; the student's tokens all straddle segments"
                )
            plan = StepPlan(
                step=state.step + 1,
                lr=ds.learning_rate(state.step, config),
                seed=(config.seed * 1_000_003 + state.step) * 4096 + ranks.rank,
                num_bytes=num_bytes,
                interface_alone=state.step < config.interface_warmup_steps,
            )
            done = take_step(engine, micro_batches, plan, state.loss_scale, ranks)
            state = state.after_batch(batch, num_bytes, done.scale)
            named = dict(zip(engine.module.sums_names, ds.sum_over_ranks(done.sums).tolist(), strict=True))
            figures = _loss_figures(named, num_bytes, recipe)
            figures |= _machine_figures(batch.num_tokens, time.monotonic() - started, waited, ranks.device)
            figures |= {"lr": plan.lr, "grad_norm": done.grad_norm, "epoch": state.position.epoch}
            figures["supervised_bytes"] = state.num_bytes
            if done.scale is not None:
                figures["loss_scale"] = done.scale.factor
            last = state.step == config.steps
            saving = state.step % config.save_every == 0 or last
            evaluation = None
            if held is not None and (saving or state.step % config.eval_every == 0):
                evaluation = held.measure(engine, ranks.device)
                figures["eval_bits_per_byte"] = evaluation.bits_per_byte
            if log is not None and (state.step % config.log_every == 0 or last or evaluation is not None):
                log.write(state.step, figures)
            signal_number = ds.largest(stop.received, ranks.device)
            if saving or signal_number:
                _save(engine, run, state, ranks, config.keep_last, evaluation)
            if signal_number and not last:
                _say_stopped(state, run, signal_number, ranks)
                raise Stopped(signal_number)
    if ranks.rank == 0:
        _summarise(run, state, figures, reader)


def _own_share(
    batch: GlobalBatch, recipe: Recipe, ends: Ends, interface: Interface | None, packing: Packing, ranks: Ranks
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a global batch, equally many on each rank."""
    student = student_config(recipe)
    masks = Masks(student.max_doubt, student.max_token_end)
    lengths = [document.num_tokens for document in batch.documents]
    max_bytes = 0 if interface is None else interface.max_bytes
    for rows in plan_micro_batches(lengths, recipe.train.micro_batch_tokens, ranks.world, packing)[ranks.rank]:
        documents = [batch.documents[i] for row in rows for i in row]
        examples = [make_example(document, ends.start, ends.end, max_bytes, masks) for document in documents]
        micro = collate(examples, [len(row) for row in rows]) if examples else empty_micro_batch(ends.start)
        extra = {} if interface is None else interface.prepare(documents, examples, micro)
        if recipe.train.objectives.alm:
            extra |= chunk_tensors(documents, micro.layout, recipe.train.alm_debias)
        yield replace(micro, extra=extra)


def _loss_figures(sums: Mapping[str, float], num_bytes: int, recipe: Recipe) -> dict[str, float]:
    """The loss and its parts per supervised byte; what was not computed is not there.

    `bits_per_byte` is of the student's own tokens, END included in the nats. Of the positions, `uncounted_share` is
    left out by the interface, `kl_share` contributes KL.
    """
    parts = {name: sums[name] / num_bytes for name in PARTS if name in sums}
    weights = recipe.train.objectives.model_dump()
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


def _names(batch: GlobalBatch) -> str:
    return "documents " + ", ".join(document.record.doc_id for document in batch.documents)


def _resume(engine: Any, recipe: Recipe, ranks: Ranks, found: resume.Checkpoint | None, convert: bool) -> State:
    """The state of the checkpoint, its weights loaded; a new state where there is none."""
    run = Path(student_config(recipe).path)
    if ranks.rank == 0:
        run_folder.cut_metrics(run, 0 if found is None else found.step)
    if found is None:
        return State(loss_scale=first_scale(recipe.train.dtype))
    state = State.from_dict(resume.load(engine, run, found, ranks.rank, ranks.world, convert)["state"])
    if ranks.rank == 0:
        say(f"resuming after step {state.step}, epoch {state.position.epoch}, record {state.position.record}")
    return state


def _save(
    engine: Any, run: Path, state: State, ranks: Ranks, keep_last: int, evaluation: keep.Evaluation | None
) -> None:
    partial = f"{run_folder.checkpoint_name(state.step)}.partial"
    ds.save(engine, run / "checkpoints", partial, {"state": state.as_dict()})
    ds.wait_for_all()
    if ranks.rank == 0:
        if evaluation is not None:
            keep.record(run, partial, evaluation)
        run_folder.commit_checkpoint(run, partial, state.step, ranks.world)
        keep.prune(run, keep_last)
    ds.wait_for_all()  # nobody exits, and has its launcher end the others, before the checkpoint has its name


def _say_stopped(state: State, run: Path, signal_number: int, ranks: Ranks) -> None:
    if ranks.rank == 0:
        name = signal.Signals(signal_number).name
        say(
            f"{name}: stopped after step {state.step}, with a checkpoint in {run / 'checkpoints'}. The same command goes on from there"
        )


def _summarise(run: Path, state: State, figures: dict[str, float], reader: DumpReader) -> None:
    transfer = json.loads((run / "start" / "transfer.json").read_text(encoding="utf-8"))
    known = {"transfer": transfer, "last_step": figures, "dumps": reader.remarks}
    write_json(run / "summary.json", {**state.as_dict(), **known})
    for reason, count in state.left_out.items():
        warn(f"left out: {count} records, {reason}")


if __name__ == "__main__":
    main()
