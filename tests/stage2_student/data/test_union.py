"""Unions: batches of several corpora by their shares, and what is refused of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config import DumpRef, StudentConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from schemas.record import Segment
from stage2_student.data import order as order_module
from stage2_student.data.batch_plan import BatchPlan, Share, UnionPosition, plan_batches, plan_union
from stage2_student.data.encode import count_pieces, encode_pieces
from stage2_student.data.examples import Masks, make_example
from stage2_student.data.order import Order, Position
from stage2_student.data.packing import plan_micro_batches
from stage2_student.data.token_counts import Counted, Lengths
from stage2_student.data.union import Member, open_members, overlaps
from stage2_student.runs import folder
from stage2_student.runs.identity import counts_key, run_identity, union_identity
from stage2_student.training.patience import Progress
from stage2_student.training.rank_batches import BatchBuilder, Sources
from stage2_student.training.state import State
from stage2_student.training.usable import times_read
from tests.support.micro_batches import count_all
from tests.support.small_dumps import make_dump, make_recipe, make_record, make_text
from tests.support.tiny import tiny_model

MAX_TOKENS = 40


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "WINDOW_PIECES", 32)


def random_lengths(rng: np.random.Generator, num_shards: int) -> Lengths:
    """Draw records of one to three pieces; some cannot be used, and some pieces have no supervised byte."""

    def counted() -> Counted:
        if rng.random() < 0.15:
            return Counted((), "unusable")
        sizes = rng.integers(2, 1 + MAX_TOKENS, rng.integers(1, 4))
        num_bytes = [0 if rng.random() < 0.1 else int(size * rng.integers(1, 5)) for size in sizes]
        return Counted(tuple(sizes.tolist()), piece_bytes=tuple(num_bytes))

    return Lengths.of([[counted() for _ in range(rng.integers(1, 40))] for _ in range(num_shards)])


def in_order(lengths: Lengths, window_pieces: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Yield (shard, piece in the shard, tokens, bytes) of a corpus's usable pieces, epoch after epoch."""
    firsts = np.cumsum(lengths.counts_S) - lengths.counts_S
    for window in Order(3, lengths.counts_S, lengths.continues_U, window_pieces=window_pieces).windows():
        for shard, unit in zip(window.shard_W.tolist(), window.unit_W.tolist(), strict=True):
            tokens, num_bytes = (int(of[firsts[shard] + unit]) for of in (lengths.tokens_U, lengths.bytes_U))
            if tokens:
                yield shard, unit, tokens, num_bytes


@pytest.mark.parametrize("seed", range(4))
def test_batches_are_those_of_a_slow_exact_count_and_resume_from_each_of_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corpora = [
        Share(random_lengths(rng, int(rng.integers(1, 8))), float(rng.choice([0.25, 1.0, 3.0, 40.0])), f"c{i}")
        for i in range(int(rng.integers(2, 5)))
    ]
    batches = list(islice(plan_union(corpora, 3, 150, MAX_TOKENS), 60))
    rates = [w * len(of.bytes_U) / int(of.bytes_U.sum()) for of, w, _ in corpora]
    slow = [in_order(of, max(1, round(32 * r / sum(rates)))) for (of, _, _), r in zip(corpora, rates, strict=True)]
    drawn, taken = [0] * len(corpora), [Counter[tuple[int, int]]() for _ in corpora]
    for batch in batches:
        tokens = 0
        for document in batch.documents:
            owed = [Fraction(num_bytes) / Fraction(of.weight) for num_bytes, of in zip(drawn, corpora, strict=True)]
            number = owed.index(min(owed))
            shard, unit, num_tokens, num_bytes = next(slow[number])
            row, piece = corpora[number].lengths.rows(np.array([shard]), np.array([unit]))
            ref = document.ref
            assert (ref.corpus, ref.shard, ref.row, ref.piece) == (number, shard, row[0], piece[0])
            assert tokens < 150 and document.num_tokens == num_tokens
            tokens, drawn[number] = tokens + num_tokens, drawn[number] + num_bytes
            taken[number][shard, unit] += 1
        assert tokens >= 150 and isinstance(batch.after, UnionPosition) and list(batch.after.num_bytes) == drawn
        shares = [num_bytes / of.weight for num_bytes, of in zip(drawn, corpora, strict=True)]
        largest = [int(of.lengths.bytes_U.max()) / of.weight for of in corpora]
        assert max(shares) - min(shares) <= max(largest)
    for of, times, position in zip(corpora, taken, batches[-1].after.of_corpora, strict=True):  # type: ignore[union-attr]
        usable = int(of.lengths.usable(MAX_TOKENS).sum())
        assert set(times.values()) <= {position.epoch, position.epoch + 1}
        assert len(times) == usable or position.epoch == 0
    for at in (0, 17, 58):
        state = State.from_dict(State(position=batches[at].after).as_dict())
        assert isinstance(state.position, UnionPosition)
        resumed = plan_union(corpora, 3, 150, MAX_TOKENS, state.position)
        for ours, theirs in zip(resumed, batches[at + 1 :], strict=False):
            assert (ours.documents, ours.after, ours.left_out) == (theirs.documents, theirs.after, theirs.left_out)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_a_small_share_keeps_no_more_records_waiting_than_a_corpus_alone(share: float) -> None:
    """A record is read once its window is planned; until all windows of its batch are, it waits in memory."""
    sizes = {"large": (8, 300), "small": (4, 16)}
    one = Counted((30,), piece_bytes=(90,))
    large, small = (Lengths.of([[one] * records] * shards) for shards, records in sizes.values())
    waiting: list[BatchPlan] = []
    most = 0
    for batch in islice(plan_union([Share(large, 1 - share), Share(small, share)], 0, 90, MAX_TOKENS), 600):
        waiting.append(batch)
        is_read = [[ref[:2] < batch.windows[ref.corpus] for ref, _ in one.documents] for one in waiting]
        while waiting and all(is_read[0]):
            del waiting[0], is_read[0]
        most = max(most, sum(map(sum, is_read)))
    assert 0 < most < 2 * 32


def test_a_corpus_alone_is_read_as_it_always_was() -> None:
    lengths = random_lengths(np.random.default_rng(0), 5)
    alone = list(islice(plan_batches(lengths, 3, 150, MAX_TOKENS), 10))
    slow = in_order(lengths, None)
    for batch in alone:
        for document in batch.documents:
            shard, unit, tokens, _ = next(slow)
            row, piece = lengths.rows(np.array([shard]), np.array([unit]))
            ref = document.ref
            assert (ref.shard, ref.row, ref.piece, document.num_tokens) == (shard, row[0], piece[0], tokens)
    assert State.from_dict(State(position=alone[3].after).as_dict()).position == alone[3].after
    assert State(position=alone[3].after).as_dict()["position"] == list(alone[3].after)  # as earlier releases store it


def test_a_corpus_without_a_usable_or_supervised_byte_is_refused_by_its_name() -> None:
    good, nothing = (
        Share(Lengths.of([[Counted((9,), piece_bytes=(9,))]]), 1.0, "prose"),
        Counted((9,), piece_bytes=(0,)),
    )
    with pytest.raises(ValueError, match=r"no byte of the corpus code is supervised, .* remove it from student.dumps"):
        next(plan_union([good, Share(Lengths.of([[nothing]]), 1.0, "code")], 0, 9, MAX_TOKENS))
    with pytest.raises(ValueError, match=r"no record of the corpus code can be used: .*'not spelled': 1"):
        next(plan_union([good, Share(Lengths.of([[Counted((), "not spelled")]]), 1.0, "code")], 0, 9, MAX_TOKENS))


@pytest.mark.parametrize("packing", ["off", "on"])
def test_micro_batches_have_documents_of_one_corpus_each_and_no_more_of_them_than_needed(packing: str) -> None:
    rng = np.random.default_rng(5)
    lengths, corpora = rng.integers(2, 40, 60).tolist(), rng.integers(0, 3, 60).tolist()
    for world in (1, 4):
        plan = plan_micro_batches(lengths, 100, world, packing, corpora)  # type: ignore[arg-type]
        used = [[i for row in rows for i in row] for of_rank in plan for rows in of_rank]
        assert sorted(i for own in used for i in own) == list(range(60))
        assert all(len({corpora[i] for i in own}) <= 1 for own in used)
        assert len({len(of_rank) for of_rank in plan}) == 1
        mixed = plan_micro_batches(lengths, 100, world, packing)  # type: ignore[arg-type]
        assert len(plan[0]) <= len(mixed[0]) + 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, two dumps of one corpus by two teachers, and one of another."""
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    make_dump(work / "a", 24, 3, seed=1, teacher="one")
    make_dump(work / "a2", 24, 3, seed=1, teacher="two")
    make_dump(work / "b", 40, 2, seed=2, teacher="three")
    return work


def refs(work: Path) -> list[dict[str, object]]:
    return [
        {"path": str(work / "b"), "corpus": "verse"},
        {"path": str(work / "a"), "corpus": "prose", "weight": 2.0},
        {"path": str(work / "a2"), "corpus": "prose"},
    ]


def opened(work: Path, dumps: Sequence[object]) -> tuple[Member, ...]:
    config = StudentConfig.model_validate({"model": "m", "path": "p", "dumps": dumps})
    return open_members(config.dumps_by_corpus, "arithmetic", 0)


def test_all_ranks_together_train_on_the_planned_documents_in_any_world_and_after_a_resume(work: Path) -> None:
    tokenizer = ByteTokenizer.load(str(work / "model"))
    members = opened(work, refs(work))
    assert [(member.name, member.weight) for member in members] == [("prose", 3.0), ("verse", 1.0)]
    recipe = make_recipe(work / "a", work / "model", work / "run", {"objectives": {"ce": 1.0}, "max_tokens": 20})
    sources = Sources(members, tokenizer, None, SpecialIds(268, (268,)))
    lengths = [count_all(member.reader, tokenizer, 20, with_bytes=True) for member in members]
    shares = [Share(of, member.weight, member.name) for of, member in zip(lengths, members, strict=True)]
    plans = list(islice(plan_union(shares, 0, 120, 20), 12))
    num_bytes = [0, 0]
    for world, first, last in ((2, 0, 7), (3, 7, 12)):
        start = plans[first - 1].after if first else UnionPosition.start(2)
        steps = [BatchBuilder(recipe, sources, None, "off", rank, world).steps(lengths, start) for rank in range(world)]
        for plan, of_ranks in zip(plans[first:last], zip(*steps, strict=False), strict=False):
            assert all(found.documents == plan.documents and found.after == plan.after for found, _ in of_ranks)
            micro_batches = [micro for _, own in of_ranks for micro in own]
            assert sum(len(micro.doc_ids) for micro in micro_batches) == len(plan.documents)
            for micro in micro_batches:
                num_bytes[micro.corpus] += micro.num_bytes
                texts = {member.name: member.reader for member in members}
                assert micro.doc_ids or not micro.num_bytes, texts
            assert isinstance(plan.after, UnionPosition) and tuple(num_bytes) == plan.after.num_bytes
    assert plans[-1].after.epoch == 0 < plans[-1].after.of_corpora[0].epoch  # type: ignore[union-attr]


def test_bytes_counted_of_each_piece_are_those_supervised_in_it(work: Path) -> None:
    tokenizer = ByteTokenizer.load(str(work / "model"))
    rng = np.random.default_rng(3)
    texts = [make_text(rng, 30), make_text(rng, 12), "né pas".encode()]
    parts = [None, [Segment(3, 11, False), Segment(20, 9, True)], [Segment(2, 5, True)]]
    records = [make_record(str(i), text, rng, part) for i, (text, part) in enumerate(zip(texts, parts, strict=True))]
    for max_tokens in (None, 12, 512):
        counted = list(count_pieces(records, tokenizer, None, max_tokens, with_bytes=True))
        alone = count_pieces(records, tokenizer, None, max_tokens)
        assert [one._replace(num_bytes=()) for one in counted if not isinstance(one, str)] == list(
            alone
        )  # a corpus alone needs no bytes
        encoded = list(encode_pieces(records, tokenizer, None, max_tokens))
        for one, pieces in zip(counted, encoded, strict=True):
            assert not isinstance(one, str) and not isinstance(pieces, str)
            examples = [make_example(piece, 268, 268, None, Masks(1, 1)) for piece in pieces]
            assert one.num_bytes == tuple(example.num_bytes for example in examples)


def test_corpora_that_overlap_are_counted_and_one_inside_another_is_refused(work: Path, tmp_path: Path) -> None:
    assert list(overlaps(opened(work, refs(work)))) == []
    assert list(overlaps(opened(work, [{"path": str(work / "a")}]))) == []
    same = [{"path": str(work / "a"), "corpus": "x"}, {"path": str(work / "a2"), "corpus": "y"}]
    with pytest.raises(ValueError, match=r"the corpus y has all 24 documents of the corpus x.*Give them one name"):
        list(overlaps(opened(work, same)))
    from tests.stage2_student.data.test_dump_join import corpus_records, write_dump

    for name, texts in {"one": [b"1", b"2", b"3"], "two": [b"3", b"4"]}.items():
        write_dump(tmp_path / name, corpus_records(0, texts), 2, name)
    both = [{"path": str(tmp_path / name), "corpus": name} for name in ("one", "two")]
    [line] = overlaps(opened(work, both))
    assert line == "1 document of 3 of the corpus one is also in two: read in both, with the targets of each"


def test_an_unfinished_dump_of_a_union_is_named(work: Path, tmp_path: Path) -> None:
    dump = make_dump(tmp_path / "c")
    (dump / "shards" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"/c is not complete: 1 of 3 shards is missing"):
        opened(work, [*refs(work), {"path": str(dump), "corpus": "third"}])


def test_dumps_of_a_union_without_a_corpus_or_a_weight_are_refused() -> None:
    def student(*dumps: dict[str, object]) -> StudentConfig:
        return StudentConfig.model_validate({"model": "m", "path": "p", "dumps": dumps})

    with pytest.raises(ValidationError, match="no `corpus` is named for b, but for other dumps there is one"):
        student({"path": "a", "corpus": "x"}, {"path": "b"})
    with pytest.raises(ValidationError, match="greater than 0"):
        student({"path": "a", "corpus": "x"}, {"path": "b", "corpus": "y", "weight": 0})
    assert student({"path": "a"}, {"path": "b"}).dumps_by_corpus == {None: (DumpRef(path="a"), DumpRef(path="b"))}
    named = student({"path": "a", "corpus": "x"}, {"path": "b", "corpus": "x"})
    assert list(named.dumps_by_corpus) == [None]  # one corpus, whatever it is called


def test_objectives_on_a_teachers_own_tokens_need_one_teacher_of_each_corpus(work: Path) -> None:
    verse, prose, second = refs(work)
    wanted = {"objectives": {"ce": 1.0, "alm": 10.0}}
    recipe = make_recipe(work / "a", work / "model", work / "run", wanted, dumps=[verse, prose])
    assert recipe.student is not None and list(recipe.student.dumps_by_corpus) == ["prose", "verse"]
    with pytest.raises(ValidationError, match=r"a mix of student.dumps \(.*/a2\) .* one dump of each corpus"):
        make_recipe(work / "a", work / "model", work / "run", wanted, dumps=[verse, prose, second])


def test_a_runs_identity_names_the_share_and_the_dumps_of_each_corpus(work: Path, tmp_path: Path) -> None:
    manifests = {name: Manifest.load(work / name) for name in ("a", "a2", "b")}

    def identity(dumps: Sequence[dict[str, object]]) -> dict[str, object]:
        recipe = make_recipe(work / "a", work / "model", tmp_path, {"objectives": {"ce": 1.0}}, dumps=dumps)
        of = {"prose": [manifests["a"], manifests["a2"]], "verse": [manifests["b"]]}
        return union_identity(recipe, of, "s", SpecialIds(1, (1,)))  # type: ignore[arg-type]

    ours = identity(refs(work))
    prose = ours["corpora"]["prose"]  # type: ignore[index]
    assert prose["share"] == 0.75 and prose["mix"]["weights"] == {"0": 2 / 3, "1": 1 / 3}
    verse, first, second = refs(work)
    assert identity([first, second, verse]) == ours
    folder.claim(tmp_path, ours)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    folder.claim(tmp_path, ours)
    with pytest.raises(ValueError, match=r"corpora\.prose\.share: 0\.75 there, 0\.5.* here"):
        folder.claim(tmp_path, identity([verse | {"weight": 3.0}, first, second]))
    assert counts_key(ours, "prose") != counts_key(ours, "verse")
    # The name of a corpus decides nothing about what is counted of its dump.
    alone = make_recipe(work / "b", work / "model", tmp_path, {"objectives": {"ce": 1.0}})
    of_b = run_identity(alone, manifests["b"], "s", SpecialIds(1, (1,)))
    assert counts_key(ours, "verse") == counts_key(of_b)


def test_a_run_on_one_corpus_is_trained_on_with_a_union_and_back_each_time_in_a_new_epoch(
    work: Path, tmp_path: Path
) -> None:
    manifests = {name: Manifest.load(work / name) for name in ("a", "b")}
    wanted = {"objectives": {"ce": 1.0}}
    alone = make_recipe(work / "a", work / "model", tmp_path, wanted | {"steps": 6})
    dumps = [{"path": str(work / name), "corpus": name} for name in ("a", "b")]
    both = make_recipe(work / "a", work / "model", tmp_path, wanted | {"steps": 9}, dumps=dumps)
    ids = SpecialIds(1, (1,))
    folder.claim(tmp_path, run_identity(alone, manifests["a"], "s", ids))
    (tmp_path / "checkpoints" / "step-000006").mkdir(parents=True)
    ours = union_identity(both, {name: [manifest] for name, manifest in manifests.items()}, "s", ids)
    with pytest.raises(ValueError, match=r"corpora\.b\.dump\.teacher\.model: .* -o train\.change=\[dump\] "):
        folder.claim(tmp_path, ours)
    folder.claim(tmp_path, ours, ("dump",))
    assert folder.has_other_data(tmp_path, 6)
    begun = folder.begun_identity(tmp_path)
    counts = Lengths.of([[Counted((40,), piece_bytes=(60,))] * 2])
    [line, _] = times_read({"a": counts, "b": counts}, begun, both.train)
    # Of the 9 steps 6 were taken before; half of 3 steps of 120 tokens of 1.5 bytes each.
    assert line.startswith("a: 50.0% of the supervised bytes of every step; 80 tokens and 120 bytes can be used, ")
    assert line.endswith("read 2.25 times in 3 steps")
    state = State(position=Position(3, 17), progress=Progress(1.0, "text", 5)).in_next_epoch(2)
    assert state.progress is None  # or a run that has stopped early would learn nothing of its new data
    assert state.position == UnionPosition((Position(4, 0), Position(4, 0)), (0, 0))
    moved = UnionPosition((Position(2, 5), Position(7, 1)), (100, 50))
    assert State(position=moved).in_next_epoch(1).position == Position(8, 0)
    assert State(position=moved).in_next_epoch(3).position == UnionPosition((Position(8, 0),) * 3, (0, 0, 0))
