"""Windows of long texts: every token once, never more than fits.

A quarter of a window stands before, or a message's beginning.
"""

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, XLNetConfig

from stage2_student.evaluation.token_windows import cut_tokens, overlap_of, window_size


@pytest.mark.parametrize("seed", range(40))
def test_every_wanted_token_is_predicted_once_from_the_tokens_before_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num, most = int(rng.integers(2, 300)), int(rng.integers(8, 80))
    tokens = list(range(1000, 1000 + num))
    wanted_L = rng.random(num + 1) < rng.choice([0.05, 0.5, 1.0])
    wanted_L[0] = False
    wanted_L[int(rng.integers(1, num + 1))] = True
    restarts = sorted(set(rng.integers(1, num, size=int(rng.integers(0, 8))).tolist())) if num > 2 else []
    repeats = bool(rng.integers(2))
    predicted: list[int] = []
    for window in cut_tokens(wanted_L, most, restarts, repeats):
        read = window.read(tokens)
        assert 0 < len(read) <= most
        for target, row in zip(window.targets.tolist(), window.rows.tolist(), strict=True):
            # What stands before it, up to the document's start or as far as the window goes, and not the token itself.
            context = read[: row + 1]
            inside = context[1:] if window.has_start else context
            assert inside == tokens[target - len(inside) : target] and (not window.has_start or context[0] == tokens[0])
            from_message = window.begin in restarts
            assert window.begin == 0 or from_message or len(inside) >= overlap_of(most)
            assert not from_message or window.has_start == repeats
        predicted += window.targets.tolist()
    assert predicted == np.flatnonzero(wanted_L).tolist()


def test_what_fits_is_one_window_from_the_first_token() -> None:
    wanted_L = np.arange(17) > 0
    [window] = cut_tokens(wanted_L, 16)
    assert window.read(range(16)) == list(range(16)) and window.rows.tolist() == list(range(16))
    assert len(list(cut_tokens(wanted_L, 15))) == 2


def test_a_later_window_of_a_chat_begins_with_a_message_where_one_is_near() -> None:
    wanted_L = np.zeros(101, dtype=bool)
    wanted_L[[*range(10, 30), *range(60, 70)]] = True
    first, second = cut_tokens(wanted_L, 40, [30])
    assert (first.begin, second.begin, second.has_start) == (0, 60 - 10, True)  # 30 is 30 away, of a window of 40
    first, second = cut_tokens(wanted_L, 40, [30, 45, 55], repeats_start=False)
    assert (second.begin, second.has_start) == (45, False)  # 55 has less than a quarter of a window before the answer


def test_a_window_has_the_models_positions_where_nobody_says_and_more_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert window_size(GPT2Config(n_positions=64), None, "small") == 64
    assert "small: windows of 64 tokens, for it has no more positions" in capsys.readouterr().err
    assert window_size(LlamaConfig(max_position_embeddings=4096), None, "large") == 2048
    assert window_size(XLNetConfig(), None, "endless") == 2048
    assert window_size(MambaConfig(), None, "endless") == 2048 and window_size(MambaConfig(), 5000, "endless") == 5000
    with pytest.raises(ValueError, match=r"max_tokens is 65, and small has 64 positions .*; give 64 or less"):
        window_size(GPT2Config(n_positions=64), 65, "small")
