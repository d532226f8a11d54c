import pytest

from pipeline.tokenization.special_ids import SpecialIds


def test_what_is_put_after_a_document_is_the_first_that_means_end() -> None:
    assert SpecialIds(None, (7, 3)).end == 7


def test_a_start_that_only_a_template_writes_is_not_taken_for_that_of_a_document() -> None:
    assert SpecialIds(0, (7,)).document_start == 0
    with pytest.raises(AssertionError):
        _ = SpecialIds(None, (7,)).document_start
