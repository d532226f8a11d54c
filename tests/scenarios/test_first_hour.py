"""The screen of a new operator's first hour stays as it is kept: what a user sees is a contract."""

from tests.support.first_hour import difference


def test_each_command_of_the_first_hour_prints_what_is_kept() -> None:
    changed = difference("first_hour", timeout=1800)
    assert not changed, f"{changed}\n\nIf this is meant: python -m tests.support.first_hour"
