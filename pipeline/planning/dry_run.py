"""What a recipe would do, before it does it: checked without weights, without a network, without a download."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import (
    CorpusConfig,
    Recipe,
    StudentConfig,
    TasksConfig,
    TeacherConfig,
    TrainConfig,
    check_engine_gives,
)
from pipeline.runtime.huggingface import check_positions, load_config
from pipeline.sources import pypi
from pipeline.sources.resolve import BYTES, resolve_file
from schemas import dump_files
from schemas.manifest import Manifest

Line = tuple[str, str]  # what, and what is planned for it


def sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each source that the recipe names, with the key that names it."""
    corpora: list[tuple[str, CorpusConfig]] = [("corpus", recipe.corpus)]
    if recipe.eval is not None:
        corpora.append(("eval", recipe.eval))
        if recipe.eval.out_of_domain is not None:
            corpora.append(("eval.out_of_domain", recipe.eval.out_of_domain))
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
    """Where a source comes from. Raises ValueError, naming the key, for one of no known form or without a pin."""
    try:
        if source == BYTES and key.endswith(".tokenizer"):
            return "the 256 bytes; made here"
        if source.startswith(pypi.PREFIX):
            wanted = pypi.parse(source)
            there = pypi.cache_folder() / "files" / wanted.sha256 / wanted.member
            state = "in the cache" if there.exists() else "to be downloaded"
            return f"{wanted.member} out of {wanted.name} {wanted.version}, {state}, sha256 {wanted.sha256[:12]}..."
        found = resolve_file(source)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return f"{found} on this machine" if isinstance(found, Path) else f"{found} from a hub or address, not looked up"


def plan(recipe: Recipe) -> list[Line]:
    """What the recipe would fetch, make and write. Raises ValueError for what would fail whatever the machine."""
    lines = [(key, describe_source(key, source)) for key, source in sources(recipe)]
    check_engine_gives(recipe)
    _check_positions(recipe)
    if recipe.corpus.has_chats:
        stripped = "; white space at the ends of each message is stripped" if recipe.corpus.strip else ""
        says = {
            ("rendered", "keep"): "says is supervised, its reasoning and calls too",
            ("rendered", "drop"): "says is supervised, its calls too; its reasoning is dropped",
            ("contents", "keep"): "says is supervised, in contents alone",
        }[recipe.corpus.turns, recipe.corpus.reasoning]
        lines.append(("corpus", f"chats: only what the assistant {says}{stripped}"))
    lines.append(("teacher", describe_teacher(recipe)))
    dump = recipe.dump
    lines.append(
        (
            "dump",
            f"top {dump.top_k} symbols of at least {dump.min_prob}, {int(dump.shard_bytes):,} bytes of text a shard",
        )
    )
    lines.append(("dump.path", describe_dump(dump.path)))
    return lines + (_student_lines(recipe) if recipe.student is not None else [])


def _check_positions(recipe: Recipe) -> None:
    """Raise ValueError where the recipe's own `max_tokens` is more than a model has positions for, of models that are
    folders here.
    """
    asked: list[tuple[TeacherConfig | StudentConfig, TeacherConfig | TrainConfig, str]] = []
    if not recipe.teacher.engine_spec.served:
        asked.append((recipe.teacher, recipe.teacher, "teacher.max_tokens"))
    if recipe.student is not None:
        asked.append((recipe.student, recipe.train, "train.max_tokens"))
    for section, limits, key in asked:
        if limits.max_tokens is not None and "max_tokens" in limits.model_fields_set:
            folder = resolve_file(section.model) if not section.model.startswith(pypi.PREFIX) else None
            if isinstance(folder, Path) and (folder / "config.json").exists():
                config = load_config(section.source.at(str(folder)))  # imports transformers: seconds
                check_positions(config, limits.max_tokens, key)


def describe_teacher(recipe: Recipe) -> str:
    """How the teacher runs; for a served one, where it is and how much of it is seen."""
    teacher = recipe.teacher
    spec, at = teacher.engine_spec, recipe.placement.base_url if teacher.engine_spec.needs_address else teacher.engine
    runs = [f"{teacher.name_at_server} at {at}"] if spec.served else [teacher.engine, teacher.dtype]
    seen = [] if spec.hidden_states else [f"the {teacher.prompt_logprobs} most probable tokens of each row"]
    return ", ".join([*runs, *seen, f"windows of {teacher.max_tokens} tokens"])


def describe_dump(dump: str) -> str:
    """What is in a dump's folder now; of an object store nothing is asked."""
    path = Path(dump)
    if "://" in dump:
        return f"{dump}, in a store; not looked into"
    if not (path / dump_files.MANIFEST).exists():
        return f"{path}, new"
    manifest = Manifest.load(path)
    done = sum(shard.path(path).exists() for shard in manifest.shards)
    if done == len(manifest.shards):
        return f"{path}, complete: {done} shards"
    return f"{path}, {done} of {len(manifest.shards)} shards done; the rest will be made"


def _student_lines(recipe: Recipe) -> list[Line]:
    student, train = recipe.student, recipe.train
    assert student is not None
    weights = ", ".join(f"{name} {weight:g}" for name, weight in train.objectives.weights.items())
    dumps = student.dumps
    paths = [f"{describe_dump(ref.path)} (weight {ref.weight:g})" for ref in dumps] or [recipe.dump.path]
    if len(paths) > 1:
        paths[-1] += f", {student.mix} mean"
    tuned = f"LoRA of rank {student.lora_rank}" if student.lora_rank else "all weights"
    if student.drop_layers:
        tuned += f", layers {', '.join(map(str, student.drop_layers))} taken out"
    tokens = train.steps * train.batch_tokens
    lines = [
        ("student", f"{student.interface} interface, {tuned}, from {', '.join(paths)}"),
        ("student.path", describe_run(Path(student.path))),
        (
            "train",
            f"{train.steps} steps of {train.batch_tokens} tokens ({tokens:,} in all), lr {train.lr:g}, {train.dtype}",
        ),
        ("train.max_tokens", _max_tokens(train)),
        (
            "train.objectives",
            f"{weights} (nats per supervised byte)",
        ),
        ("train.eval_every", _evaluations(train)),
        ("train.deepspeed", _deepspeed_line(train)),
    ]
    if recipe.eval is None:
        lines.append(("eval", "none: `bld eval` needs an eval section, --corpus or --tasks"))
    else:
        lines += [(f"eval.tasks.{name}", describe_tasks(group)) for name, group in recipe.eval.tasks.items()]
    return lines


def describe_tasks(group: TasksConfig) -> str:
    """What the harness is to ask, and how."""
    how = ["in the chat template"] if group.apply_chat_template else []
    how += [] if group.num_fewshot is None else [f"{group.num_fewshot} examples before a question"]
    how += [] if group.limit is None else [f"{group.limit} questions of each"]
    return ", ".join(group.names) + (f"; {', '.join(how)}" if how else "")


def _evaluations(train: TrainConfig) -> str:
    kept = f"the {train.keep_last} newest" if train.keep_last else "all"
    if not train.eval_every:
        return f"no evaluation while it trains; {kept} of its checkpoints are kept"
    return f"every {train.eval_every} steps on {train.eval_documents} documents of eval; {kept} of its checkpoints are kept, and the best"


def _max_tokens(train: TrainConfig) -> str:
    given = "" if train.max_tokens is not None else ", or the student's positions where it has fewer"
    return (
        f"records of more than {train.piece_tokens} of the student's tokens{given} are cut into pieces; what cannot be used `bld student` "
        "counts when it begins, and --calibrate on a sample"
    )


def _deepspeed_line(train: TrainConfig) -> str:
    """Stage, ranks, and what lies elsewhere than on the device."""
    config = train.deepspeed
    ranks = f"{train.num_processes} process(es)" if train.hostfile is None else f"ranks of {train.hostfile}"
    line = f"ZeRO stage {config.zero_stage}, {ranks}"
    for what, where in (("optimizer", config.offload_optimizer), ("parameters", config.offload_parameters)):
        line += f", {what} on the {where}" if where != "none" else ""
    return line + (f", {config.config} merged over it" if config.config else "")


def describe_run(path: Path) -> str:
    """What is in a student's folder now."""
    checkpoints = [p for p in (path / "checkpoints").glob("*") if p.is_dir()]
    if (path / "export").exists():
        return f"{path}, trained: export/ is there"
    return f"{path}, {len(checkpoints)} checkpoint(s); training resumes" if checkpoints else f"{path}, new"


def print_plan(recipe: Recipe) -> None:
    """Print `plan`."""
    print_lines(plan(recipe))


def print_lines(lines: Sequence[Line]) -> None:
    """One aligned line each."""
    width = max(len(what) for what, _ in lines)
    for what, text in lines:
        print(f"{what:<{width}}  {text}")
