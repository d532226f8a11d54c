"""The usable part of a dump: its count, what is cut, and what is left out, by reason and with its share of bytes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, TrainConfig, student_config
from pipeline.runtime.format import are, count_of
from pipeline.runtime.log import info, warning
from schemas import dump_files
from schemas.record import RecordText
from stage2_student.data.batch_plan import repeated
from stage2_student.data.encode import TOO_LONG
from stage2_student.data.lengths.mapped import kept_counts, mapped_counts
from stage2_student.data.order import READ, WHOLE_CHATS, WHOLE_RECORDS
from stage2_student.data.pieces import overlap_tokens
from stage2_student.data.token_counts import Lengths, are_counted, count_records, keep_counts
from stage2_student.data.union import Member
from stage2_student.distributed.rank_messages import Channel
from stage2_student.model.context_length import sized
from stage2_student.model.initial_student import student_tokenizer
from stage2_student.runs import folder as run_folder
from stage2_student.runs.folder import begun_identity
from stage2_student.runs.identity import RunVersions, counts_key, run_identity, union_identity
from stage2_student.runs.train_on import data_since
from stage2_student.training.rank_batches import Sources, cut_at, uses_turns


def identity_of(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """Return the identity of a recipe's run."""
    members, tokenizer, chat, ids = sources
    run = Path(student_config(recipe).path)
    versions = RunVersions(run_folder.data_order(run), run_folder.adapters_by_peft(run))
    manifests = {of.name: [of.reader.manifest, *of.reader.other_manifests] for of in members}
    if len(members) > 1:
        identity = union_identity(recipe, manifests, tokenizer.sha256, ids, versions)
    else:
        first, *others = manifests[members[0].name]
        identity = run_identity(recipe, first, tokenizer.sha256, ids, others, versions)
    if chat is not None:
        identity["student"]["template_sha256"] = chat.template.sha256
    return identity


def counted_lengths(recipe: Recipe, sources: Sources, channel: Channel) -> list[Lengths]:
    """Count the tokens of all records, by corpus; each rank counts its part of those not counted before."""
    run, members = Path(student_config(recipe).path), sources.members
    order, identity = run_folder.data_order(run), identity_of(recipe, sources)
    for member in members:
        _count(recipe, sources, member, channel)

    def mapped(makes: bool) -> list[Lengths]:
        keys = [counts_key(identity, member.name) for member in members]
        return [
            mapped_counts(counts_folder(run, member.name), member.reader.num_shards, key, makes)
            for member, key in zip(members, keys, strict=True)
        ]

    channel.gather()
    if channel.rank == 0:
        mapped(makes=True)
    channel.gather()
    lengths = mapped(makes=False)
    if channel.rank != 0:
        return lengths
    for member, counts in zip(members, lengths, strict=True):
        of = "" if member.name is None else f"{member.name}: "
        has_chats = "template_sha256" in identity["student"] and member.reader.manifest.has_chats
        for line in remarks(counts, recipe.train, order, has_chats, alone=len(members) == 1):
            info(of + line)
    if len(members) > 1:
        begun = begun_identity(run)
        for line in times_read(dict(zip(begun["corpora"], lengths, strict=True)), begun, recipe.train):
            info(line)
    elif remark := repeated(lengths[0].sums(recipe.train.piece_tokens).tokens, recipe.train.batch_tokens):
        warning(remark)
    return lengths


def _count(recipe: Recipe, sources: Sources, member: Member, channel: Channel) -> None:
    """Count this rank's part of a corpus."""
    run, reader = Path(student_config(recipe).path), member.reader
    order = run_folder.data_order(run)
    key = counts_key(identity_of(recipe, sources), member.name)
    how = cut_at(recipe.train, order), uses_turns(order), len(sources.members) > 1
    own = range(channel.rank, reader.num_shards, channel.world)
    keep_counts(
        counts_folder(run, member.name),
        key,
        own,
        lambda shard: count_records(reader.record_texts(shard), sources.tokenizer, sources.chat, *how),
    )


def remarks(
    lengths: Lengths, train: TrainConfig, order: int, has_chats: bool = False, alone: bool = True
) -> Iterator[str]:
    """Yield a line about an epoch, one about what is cut, and one for each reason to leave out records or turns.

    Args:
        order: version of the run's order (`stage2_student.data.order`).
        has_chats: whether the dump holds chats.
        alone: whether there is no other corpus; of a union `times_read` says how long an epoch takes.
    """
    max_tokens = train.piece_tokens
    sums = lengths.sums(max_tokens)
    tokens, num_left_out = sums.tokens, len(lengths.reasons) + sums.too_long
    steps = f", {tokens / train.batch_tokens:,.1f} steps" if alone else ""
    yield (
        f"an epoch: {count_of(lengths.num_records - num_left_out, 'record', ',')}, {count_of(tokens, 'token', ',')}"
        f"{steps}; {count_of(num_left_out, 'record', ',')} cannot be used"
    )
    if lengths.num_rendered:
        yield (
            f"{count_of(lengths.num_rendered, 'chat', ',')} {are(lengths.num_rendered)} read "
            f"{count_of(lengths.num_renderings, 'time', ',')}, each time with other turns supervised: the "
            "student's template renders earlier turns differently once a chat continues"
        )
    if lengths.num_cut:
        yield (
            f"{count_of(lengths.num_cut, 'record', ',')} of more than {max_tokens} tokens (train.max_tokens) "
            f"{are(lengths.num_cut)} cut into {lengths.num_cut_pieces:,} pieces, each after the first with "
            f"about {overlap_tokens(max_tokens)} tokens of context"
        )
    for line in _left_out(lengths):
        yield f"left out: {line}"
    if sums.too_long:
        share = _share(sums.tokens_too_long, sums.all_tokens)
        yield f"left out: {count_of(sums.too_long, 'record', ',')}, {share} of the tokens: {TOO_LONG}"
    if order == WHOLE_CHATS and has_chats:
        yield (
            "this run continues as it began: a chat is left out if the student's template renders one of its turns "
            "differently; a run in a new student.path uses its other turns"
        )
    if order == WHOLE_RECORDS:
        yield (
            "this run continues in the order that it began in: whole records, shuffled with their 2,047 neighbours; a "
            "run in a new student.path cuts them, and shuffles them across shards"
        )


def usable_lines(recipe: Recipe, records: Sequence[RecordText]) -> Iterator[tuple[str, str]]:
    """Yield label and text about how much of a sample of a dump's records the student can use.

    For `bld plan --calibrate`.
    """
    recipe, remark = sized(recipe)
    if remark is not None:
        yield "train.max_tokens", remark
    student = student_config(recipe)
    tokenizer, chat, _ = student_tokenizer(student, recipe.corpus.has_chats)
    max_tokens = recipe.train.piece_tokens
    lengths = Lengths.of([list(count_records(records, tokenizer, chat, max_tokens))])
    usable = lengths.num_bytes - lengths.num_unused_bytes
    yield (
        "student's records",
        f"of {lengths.num_records:,} sampled, {lengths.num_cut:,} {are(lengths.num_cut)} cut into "
        f"{lengths.num_cut_pieces:,} pieces of at most {max_tokens} tokens; "
        f"{_share(usable, lengths.num_bytes)} of the supervised bytes can be used",
    )
    for line in _left_out(lengths):
        yield "left out", line


def times_read(lengths: Mapping[str, Lengths], identity: Mapping[str, Any], train: TrainConfig) -> Iterator[str]:
    """Yield a line about each corpus of a union: its share, its size, and how often a run reads it.

    Args:
        identity: the run's.
    """
    corpora, steps = identity["corpora"], train.steps - data_since(identity)
    max_tokens = train.piece_tokens
    sums = {name: counts.sums(max_tokens) for name, counts in lengths.items()}
    sizes = {name: (of.tokens, of.num_bytes) for name, of in sums.items()}
    # A step has a number of tokens, and shares of bytes.
    tokens_per_byte = sum(corpora[name]["share"] * tokens / num_bytes for name, (tokens, num_bytes) in sizes.items())
    all_bytes = steps * train.batch_tokens / tokens_per_byte
    for name, (tokens, num_bytes) in sizes.items():
        share = corpora[name]["share"]
        yield (
            f"{name}: {share:.1%} of the supervised bytes of every step; {count_of(tokens, 'token', ',')} and "
            f"{count_of(num_bytes, 'byte', ',')} can be used, read {share * all_bytes / num_bytes:,.2f} times in "
            f"{count_of(steps, 'step', ',')}"
        )


def counts_folder(run: Path, corpus: str | None) -> Path:
    """Return the folder of a run's token counts; of a corpus, if it has several."""
    return run / "lengths" if corpus is None else run / "lengths" / corpus


def _left_out(lengths: Lengths) -> Iterator[str]:
    for reason, (records, num_bytes) in lengths.unusable().items():
        share = _share(num_bytes, lengths.num_bytes)
        yield f"{count_of(records, 'record', ',')}, {share} of the supervised bytes: {reason}"
    for reason, turns, num_bytes in lengths.turns_left_out.values():
        share = _share(num_bytes, lengths.num_bytes)
        yield f"{count_of(turns, 'turn', ',')} of chats used without them, {share} of the supervised bytes: {reason}"


def counted_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield label and text about what the run in `student.path` counted when it began, for `bld plan`.

    Nothing if it has not counted all of its shards.
    """
    run = Path(student_config(recipe).path)
    if not (run / dump_files.RUN_IDENTITY).exists():
        return
    identity = begun_identity(run)
    if identity.get("data_order") not in READ:
        return
    corpora = identity.get("corpora", {})
    lengths: dict[str | None, Lengths] = {}
    for name in corpora or [None]:
        folder = counts_folder(run, name)
        num_shards = len(list(folder.glob(dump_files.SHARD_GLOB)))
        if not are_counted(folder, num_shards, counts_key(identity, name)):
            return
        lengths[name] = kept_counts(folder, num_shards)
    train = recipe.train.model_copy(update={"max_tokens": identity["train"]["max_tokens"]})
    has_chats = "template_sha256" in identity["student"]
    for name, counts in lengths.items():
        for remark in remarks(counts, train, identity["data_order"], has_chats, alone=not corpora):
            yield "counted in student.path", remark if name is None else f"{name}: {remark}"
    for line in times_read({str(name): counts for name, counts in lengths.items()}, identity, train) if corpora else ():
        yield "counted in student.path", line


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
