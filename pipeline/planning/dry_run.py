"""Dry run: what a recipe would do, checked without weights, network or downloads."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import (
    CorpusConfig,
    DumpRef,
    Recipe,
    StudentConfig,
    TasksConfig,
    TeacherConfig,
    TrainConfig,
    check_engine_gives,
)
from pipeline.planning.engine_shares import describe_shares, engine_shares
from pipeline.runtime.format import count_of
from pipeline.runtime.huggingface import check_positions, load_config
from pipeline.sources import pypi
from pipeline.sources.resolve import BYTES, resolve_file
from schemas import dump_files
from schemas.manifest import Manifest

Line = tuple[str, str]  # a recipe key or section, and what is planned for it

_BYTES_PER_TOKEN = 4  # of a student, before its tokens are counted


def sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each source that the recipe names, with its key."""
    corpora: list[tuple[str, CorpusConfig]] = [("corpus", recipe.corpus)]
    if recipe.eval is not None:
        corpora.append(("eval", recipe.eval))
        if recipe.eval.out_of_domain is not None:
            corpora.append(("eval.out_of_domain", recipe.eval.out_of_domain))
        corpora += [(f"eval.corpora.{name}", corpus) for name, corpus in recipe.eval.corpora.items()]
    if recipe.generate is not None:
        corpora.append(("generate.prompts", recipe.generate.prompts))
    for key, corpus in corpora:
        yield f"{key}.source", corpus.source
        for index, excluded in enumerate(corpus.exclude):
            yield f"{key}.exclude[{index}].source", excluded.source
    models = [("teacher", recipe.teacher)] + ([("student", recipe.student)] if recipe.student is not None else [])
    for key, section in models:
        if not (isinstance(section, TeacherConfig) and section.is_mere_name):
            yield f"{key}.model", section.model
        if section.tokenizer is not None:
            yield f"{key}.tokenizer", section.tokenizer
    if recipe.student is not None and recipe.student.chat_template is not None:
        yield "student.chat_template", recipe.student.chat_template


def describe_source(key: str, source: str) -> str:
    """Return where a source comes from.

    Raises ValueError, naming the key, if its form is not known or it has no pin.
    """
    try:
        if source == BYTES and key.endswith(".tokenizer"):
            return "built-in byte tokenizer"
        if source.startswith(pypi.PREFIX):
            member = pypi.parse(source)
            cached = pypi.cache_folder() / "files" / member.sha256 / member.member
            state = "in the cache" if cached.exists() else "to be downloaded"
            return f"{member.member} from {member.name} {member.version}, {state}, sha256 {member.sha256[:12]}..."
        resolved = resolve_file(source)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if isinstance(resolved, Path):
        return f"{resolved} on this machine"
    return f"{resolved} from a hub or address, not looked up"


def plan(recipe: Recipe, cuts_records: bool = True) -> list[Line]:
    """List what the recipe would download, make and write.

    Args:
        cuts_records: whether the student cuts long records; a run begun by an early release leaves them out.
    Raises:
        ValueError: it would fail on any machine.
    """
    lines = [(key, _to_be_written(recipe, source) or describe_source(key, source)) for key, source in sources(recipe)]
    check_engine_gives(recipe)
    _check_positions(recipe)
    if recipe.corpus.has_chats:
        stripped = "; leading and trailing white space of each message is stripped" if recipe.corpus.strip else ""
        supervised = {
            ("rendered", "keep"): "turns are supervised, including reasoning and calls",
            ("rendered", "drop"): "turns are supervised, including calls; reasoning is dropped",
            ("contents", "keep"): "contents are supervised",
        }[recipe.corpus.turns, recipe.corpus.reasoning]
        lines.append(("corpus", f"chats: only the assistant's {supervised}{stripped}"))
    lines.append(("teacher", describe_teacher(recipe)))
    shares = engine_shares(recipe)
    if shares[0] or len(shares) > 1:
        lines.append(("placement", describe_shares(recipe, shares)))
    dump = recipe.dump
    lines.append(
        (
            "dump",
            f"top {dump.top_k} symbols of at least {dump.min_prob}, {int(dump.shard_bytes):,} bytes of text per shard",
        )
    )
    if dump.tokens is not None:
        tokens = f"top {dump.tokens.top_k} of at least {dump.tokens.min_prob} at each of the teacher's tokens; its END"
        lines.append(("dump.tokens", tokens))
    if dump.covering.beam_width:
        lines.append(("dump.covering", describe_branches(recipe)))
    lines.append(("dump.path", describe_dump(dump.path)))
    return lines + (_student_lines(recipe, cuts_records) if recipe.student is not None else [])


def _to_be_written(recipe: Recipe, source: str) -> str | None:
    """Return that a source is what `bld generate` will write by this recipe; None for any other."""
    if recipe.generate is None or source != recipe.generate.path or ("://" not in source and Path(source).exists()):
        return None
    return f"{source}, which `bld generate` writes"


def _check_positions(recipe: Recipe) -> None:
    """Raise ValueError if the recipe's own `max_tokens` exceeds a model's positions.

    Only models that are folders on this machine are checked.
    """
    models: list[tuple[TeacherConfig | StudentConfig, TeacherConfig | TrainConfig, str]] = []
    if not recipe.teacher.engine_spec.served:
        models.append((recipe.teacher, recipe.teacher, "teacher.max_tokens"))
    if recipe.student is not None:
        models.append((recipe.student, recipe.train, "train.max_tokens"))
    for section, limits, key in models:
        if limits.max_tokens is not None and "max_tokens" in limits.model_fields_set:
            folder = resolve_file(section.model) if not section.model.startswith(pypi.PREFIX) else None
            if isinstance(folder, Path) and (folder / "config.json").exists():
                config = load_config(section.source.at(str(folder)))  # imports transformers: seconds
                check_positions(config, limits.max_tokens, key)


def describe_teacher(recipe: Recipe) -> str:
    """Return how the teacher runs; for a served one, its address and how much of its output is available."""
    teacher = recipe.teacher
    spec, at = teacher.engine_spec, recipe.placement.base_url if teacher.engine_spec.needs_address else teacher.engine
    runs = [f"{teacher.name_at_server} at {at}"] if spec.served else [teacher.engine, teacher.dtype]
    seen = [] if spec.whole_softmax else [f"the {teacher.prompt_logprobs} most probable tokens of each row"]
    return ", ".join([*runs, *seen, f"windows of {teacher.max_tokens} tokens"])


# Teacher tokens computed for branch rows above a share of the mass, in times those of the canonical rows: where a
# branch adds its own tokens (transformers, vLLM), and where it recomputes a block of 16. SmolLM2-135M on encyclopaedic
# text (tests/bench/pages/exactness.md).
BRANCH_COSTS = ((0.3, 1.1, 1.8), (0.1, 1.2, 2.8), (0.05, 1.3, 3.7), (0.03, 1.4, 4.5), (0.01, 1.7, 6.7))


def describe_branches(recipe: Recipe) -> str:
    """Return what the covering's branch rows will cost, as far as it is known before they are computed."""
    threshold = recipe.dump.covering.branch_threshold
    at_least = next((cost for cost in BRANCH_COSTS if cost[0] <= threshold), BRANCH_COSTS[-1])
    times = at_least[2] if recipe.teacher.engine_spec.recomputes_blocks else at_least[1]
    than = "more than " if threshold < at_least[0] else ""
    return (
        f"branch rows above {threshold:g} of the mass: {than}some {times:g} times the teacher tokens of a dump without "
        "(measured with SmolLM2-135M; `bld plan --calibrate` measures this teacher)"
    )


def describe_dump(dump: str) -> str:
    """Return the present state of a dump's folder; an object store is not asked."""
    path = Path(dump)
    if "://" in dump:
        return f"{dump}, in an object store; not checked"
    if not (path / dump_files.MANIFEST).exists():
        return f"{path}, new"
    manifest = Manifest.load(path)
    done = sum(shard.path(path).exists() for shard in manifest.shards)
    if done == len(manifest.shards):
        return f"{path}, complete: {count_of(done, 'shard')}"
    return f"{path}, {done} of {count_of(len(manifest.shards), 'shard')} done; the rest will be made"


def _student_lines(recipe: Recipe, cuts_records: bool) -> list[Line]:
    student, train = recipe.student, recipe.train
    assert student is not None
    weights = ", ".join(f"{name} {weight:g}" for name, weight in train.objectives.weights.items() if weight)
    by_corpus = student.dumps_by_corpus
    sources = [_sources_line(refs, student.mix) for refs in by_corpus.values()] or [recipe.dump.path]
    source = sources[0] if len(sources) == 1 else f"{len(sources)} corpora"
    everything = "all weights" if student.trained == "all" else "embedding and head alone"
    tuned = f"LoRA of rank {student.lora_rank}" if student.lora_rank else everything
    if student.lora_base != "full":
        tuned += " beside layers of 4 bits"
    if student.drop_layers:
        tuned += f", layers {', '.join(map(str, student.drop_layers))} removed"
    tokens = train.steps * train.batch_tokens
    lines = [
        ("student", f"{student.interface} interface, {tuned}, from {source}"),
        *_corpora_lines(recipe, sources),
        ("student.path", describe_run(Path(student.path))),
        (
            "train",
            f"{count_of(train.steps, 'step')} of {count_of(train.batch_tokens, 'token')} ({tokens:,} in all), "
            f"lr {train.lr:g}, {train.dtype}" + _decay(train),
        ),
        ("train.max_tokens", _max_tokens(train, cuts_records)),
        (
            "train.objectives",
            f"{weights} (nats per supervised byte)",
        ),
        *_marginal_kernel(student, train),
        *_accelerations(train),
        ("train.eval_every", _evaluations(train)),
        ("train.deepspeed", _deepspeed_line(train)),
    ]
    if recipe.eval is None:
        lines.append(("eval", "none: `bld eval` needs an eval section, --corpus or --tasks"))
    else:
        lines += [(f"eval.tasks.{name}", describe_tasks(group)) for name, group in recipe.eval.tasks.items()]
    return lines


def _sources_line(refs: Sequence[DumpRef], mix: str) -> str:
    """Return the state of the dumps of a corpus, and how they are mixed."""
    paths = [f"{describe_dump(ref.path)} (weight {ref.weight:g})" for ref in refs]
    return ", ".join(paths) + (f", {mix} mean" if len(paths) > 1 else "")


def _corpora_lines(recipe: Recipe, sources: Sequence[str]) -> Iterator[Line]:
    """Yield a line about each corpus of a union: its share and its dumps; with local dumps, how often it is read."""
    student, train = recipe.student, recipe.train
    assert student is not None
    by_corpus = student.dumps_by_corpus
    total = sum(ref.weight for ref in student.dumps)
    if len(by_corpus) < 2:
        return
    for (name, refs), source in zip(by_corpus.items(), sources, strict=True):
        share = sum(ref.weight for ref in refs) / total
        size = _dump_bytes(refs[0].path)
        times = ""
        if size:
            read = share * train.steps * train.batch_tokens * _BYTES_PER_TOKEN
            times = (
                f"; {count_of(size, 'byte', ',')} of text, read some {read / size:,.1f} times if a token has "
                f"{_BYTES_PER_TOKEN} bytes (`bld student` counts them at its start)"
            )
        yield f"student.dumps, {name}", f"{share:.1%} of the supervised bytes of every step, from {source}{times}"


def _dump_bytes(dump: str) -> int:
    """Return the bytes of text that a dump's plan holds; 0 if it is not known on this machine."""
    if "://" in dump or not (Path(dump) / dump_files.MANIFEST).exists():
        return 0
    return sum(shard.num_bytes for shard in Manifest.load(Path(dump)).shards)


def describe_tasks(group: TasksConfig) -> str:
    """Return which tasks the harness will run, and how."""
    how = ["in the chat template"] if group.apply_chat_template else []
    how += [] if group.num_fewshot is None else [f"{count_of(group.num_fewshot, 'example')} before each question"]
    how += [] if group.limit is None else [f"{count_of(group.limit, 'question')} per task"]
    return ", ".join(group.names) + (f"; {', '.join(how)}" if how else "")


def _accelerations(train: TrainConfig) -> Iterator[Line]:
    """Yield a line about each option of speed and memory that is not as by default."""
    if train.attention != "auto":
        yield "train.attention", train.attention
    if train.precision != "autocast":
        yield "train.precision", "bfloat16 weights, with a float32 copy for the optimizer"
    if train.optimizer != "adamw":
        yield "train.optimizer", f"{train.optimizer}: moments of 2 bytes a trained weight instead of 8"
    if train.fused_ce != "none":
        yield "train.fused_ce", train.fused_ce
    if train.compile:
        yield "train.compile", "blocks are compiled in the first steps"


def _marginal_kernel(student: StudentConfig, train: TrainConfig) -> Iterator[Line]:
    """Yield a line about the kernel of the interface `token_marginal`, if the run computes it."""
    if student.interface != "token_marginal" or not train.objectives.uses_bytes:
        return
    on_gpu = {"auto": "Triton if it is installed", "triton": "Triton", "torch": "torch's own operations"}
    kept = f", keeping {train.marginal_kept_gib:g} GiB of logits" if train.marginal_kernel != "torch" else ""
    here = "" if train.marginal_kernel == "triton" else "; a compiled kernel on a CPU"
    yield "train.marginal_kernel", f"{train.marginal_kernel}: on a GPU {on_gpu[train.marginal_kernel]}{kept}{here}"


def _decay(train: TrainConfig) -> str:
    of = "matrices" if train.decay == "matrices" else "all weights"
    return f", weight decay {train.weight_decay:g} of {of}" if train.weight_decay else ""


def _evaluations(train: TrainConfig) -> str:
    kept = f"the {train.keep_last} newest" if train.keep_last else "all"
    if not train.eval_every:
        return f"no evaluation during training; {kept} checkpoints are kept"
    return (
        f"every {count_of(train.eval_every, 'step')} on {count_of(train.eval_documents, 'document')} of eval; "
        f"{kept} checkpoints are kept, and the best"
    )


def _max_tokens(train: TrainConfig, cuts_records: bool) -> str:
    or_positions = "" if train.max_tokens is not None else ", or the student's positions if it has fewer,"
    then = "cut into pieces" if cuts_records else "left out, as when this run was begun"
    return (
        f"records of more than {train.piece_tokens} of the student's tokens{or_positions} are {then}; "
        "`bld student` counts the unusable ones at its start, --calibrate on a sample"
    )


def _deepspeed_line(train: TrainConfig) -> str:
    """Return the ZeRO stage, the ranks, and what is offloaded."""
    config = train.deepspeed
    processes = "1 process" if train.num_processes == 1 else f"{train.num_processes} processes"
    ranks = processes if train.hostfile is None else f"ranks of {train.hostfile}"
    line = f"ZeRO stage {config.zero_stage}, {ranks}"
    for what, where in (("optimizer", config.offload_optimizer), ("parameters", config.offload_parameters)):
        line += f", {what} on the {where}" if where != "none" else ""
    return line + (f", {config.config} merged over it" if config.config else "")


def describe_run(path: Path) -> str:
    """Return the present state of a student's folder."""
    checkpoints = [p for p in (path / "checkpoints").glob("*") if p.is_dir()]
    if (path / "export").exists():
        return f"{path}, trained: export/ exists"
    return f"{path}, {count_of(len(checkpoints), 'checkpoint')}; training resumes" if checkpoints else f"{path}, new"


def print_plan(recipe: Recipe, cuts_records: bool = True) -> None:
    """Print the lines of `plan`."""
    print_lines(plan(recipe, cuts_records))


def print_lines(lines: Sequence[Line]) -> None:
    """Print one aligned line for each."""
    width = max(len(key) for key, _ in lines)
    for key, text in lines:
        print(f"{key:<{width}}  {text}")
