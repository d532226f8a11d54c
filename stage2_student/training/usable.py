"""Text about the usable part of a dump: what is cut, and what is left out, by reason and with its share of bytes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, TrainConfig, student_config
from pipeline.runtime.format import are, count_of
from schemas import dump_files
from schemas.record import RecordText
from stage2_student.data.encode import TOO_LONG
from stage2_student.data.order import READ, WHOLE_CHATS, WHOLE_RECORDS
from stage2_student.data.pieces import overlap_tokens
from stage2_student.data.token_counts import Lengths, are_counted, count_records, kept_counts
from stage2_student.model.context_length import sized
from stage2_student.model.initial_student import student_tokenizer
from stage2_student.runs.folder import begun_identity
from stage2_student.runs.identity import counts_key
from stage2_student.runs.train_on import data_since


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
    usable_U = lengths.usable(max_tokens)
    too_long_U = lengths.tokens_U > max_tokens
    tokens, num_left_out = int(lengths.tokens_U[usable_U].sum()), len(lengths.reasons) + int(too_long_U.sum())
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
    if too_long := int(too_long_U.sum()):
        share = _share(int(lengths.tokens_U[too_long_U].sum()), int(lengths.tokens_U.sum()))
        yield f"left out: {count_of(too_long, 'record', ',')}, {share} of the tokens: {TOO_LONG}"
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
    sizes = {
        name: (counts.num_usable_tokens(max_tokens), int(counts.bytes_U[counts.usable(max_tokens)].sum()))
        for name, counts in lengths.items()
    }
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
