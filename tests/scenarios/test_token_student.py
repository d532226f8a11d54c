"""Students of chats that compare tokens with the teacher's: only what a turn says, and how it ends, is compared."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import TrainConfig
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.token_vocabulary import read_vocabulary
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.objectives import ON_TOKENS, objectives_on_tokens
from stage2_student.losses.token_alignment import chunks
from stage2_student.losses.token_divergence import StrictKL
from stage2_student.losses.vocabulary_map import TokenizerPair
from tests.scenarios import test_chat_dump as chats
from tests.support.chats import CHAT_FAMILIES, chat_model, load_chat
from tests.support.tiny import MERGES


class Dumped:
    """A teacher's chats, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        model = chat_model(folder / "qwen", "qwen")
        recipe = chats.write_recipe(folder, model, [{"messages": messages} for messages in chats.CHATS])
        self.records: list[Record] = chats.dump(recipe, "dump.tokens={top_k: 6, min_prob: 0.01}")
        self.teacher = ChatTokenizer.load(str(model)).tokenizer
        self.ends = tuple(Manifest.load(folder / "dump").identity["teacher"]["end_ids"])
        assert tuple(read_vocabulary(folder / "dump")) == self.teacher.token_bytes


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    return Dumped(tmp_path_factory.mktemp("chats"))


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_rows_of_a_chat_are_supervised_tokens_over_the_same_bytes_and_ends_of_turns(name: str, dumped: Dumped) -> None:
    student = load_chat(name, MERGES[:5])
    end = student.end_of_turn()
    assert end is not None
    ours, theirs = student.tokenizer.token_bytes, dumped.teacher.token_bytes
    pair = TokenizerPair(dumped.teacher, student.tokenizer, dumped.ends, end, len(ours))
    objectives = {name: 1.0 for name in ON_TOKENS if name != "token_kl"}
    train = TrainConfig.model_validate({"objectives": objectives})
    compared = num_ends = 0
    for encoded in encode_records(dumped.records, student.tokenizer, 512, student):
        if not isinstance(encoded, Encoded):
            continue  # a template that changes what is said
        labels_L = make_example(encoded, 0, end, 0, Masks(1.0, 1.0)).labels_L
        found = chunks(encoded)
        teacher_ends = np.cumsum(encoded.record.teacher_token_lengths)
        for (first, after), (start, stop) in zip(found.student_C2, found.spans_C2, strict=True):
            assert (labels_L[first:after] == encoded.tokens[first:after]).all()
            assert encoded.starts[first] == start and encoded.ends[after - 1] == stop and stop in teacher_ends
        made = objectives_on_tokens(pair, train)
        for objective in made.values():
            objective.tensors([encoded], Layout.of([encoded.num_tokens]))
        strict = made["strict_kl"]
        assert isinstance(strict, StrictKL)
        state_R, ids_RK, _ = strict.rows(encoded)
        for state, ids_K in zip(state_R.tolist(), ids_RK.tolist(), strict=True):
            if labels_L[state] == end:
                assert end in ids_K
                num_ends += 1
                continue
            text = ours[int(encoded.tokens[state])]
            assert labels_L[state] == encoded.tokens[state] and text in theirs
            compared += 1
        assert set(np.flatnonzero(labels_L == end).tolist()) >= {s for s in state_R.tolist() if labels_L[s] == end}
    assert compared > 3 and num_ends > 2
