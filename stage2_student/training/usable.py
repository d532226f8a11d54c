"""Text about the usable part of a dump: what is cut, and what is left out, by reason and with its share of bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

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


def remarks(lengths: Lengths, train: TrainConfig, order: int, has_chats: bool = False) -> Iterator[str]:
    """Yield a line about an epoch, one about what is cut, and one for each reason to leave out records or turns.

    Args:
        order: version of the run's order (`stage2_student.data.order`).
        has_chats: whether the dump holds chats.
    """
    max_tokens = train.piece_tokens
    usable_U = lengths.usable(max_tokens)
    too_long_U = lengths.tokens_U > max_tokens
    tokens, num_left_out = int(lengths.tokens_U[usable_U].sum()), len(lengths.reasons) + int(too_long_U.sum())
    yield (
        f"an epoch: {count_of(lengths.num_records - num_left_out, 'record', ',')}, {count_of(tokens, 'token', ',')}, "
        f"{tokens / train.batch_tokens:,.1f} steps; {count_of(num_left_out, 'record', ',')} cannot be used"
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
    path, folder = run / dump_files.RUN_IDENTITY, run / "lengths"
    if not path.exists():
        return
    identity = begun_identity(run)
    num_shards = len(list(folder.glob(dump_files.SHARD_GLOB)))
    if identity.get("data_order") not in READ or not are_counted(folder, num_shards, counts_key(identity)):
        return
    train = recipe.train.model_copy(update={"max_tokens": identity["train"]["max_tokens"]})
    has_chats = "template_sha256" in identity["student"]
    for remark in remarks(kept_counts(folder, num_shards), train, identity["data_order"], has_chats):
        yield "counted in student.path", remark


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
