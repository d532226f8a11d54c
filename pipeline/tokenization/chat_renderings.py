"""Turns of a chat that share one rendering, and the rendering as control tokens and the text between them.

A turn is found in the rendering of a later one if the template writes it there as it did at first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.tokenization.chat_template import Part
from pipeline.tokenization.control_tokens import ControlTokens, Found, mended


@dataclass(frozen=True)
class Turn:
    """A chat rendered up to a turn.

    Attributes:
        text: the rendering, in which spellings of control tokens are broken.
        begin, end: characters `begin .. end` are the turn.
        stop: the character where the control token that ends the turn stops.
        end_token: that control token.
        number: how many tokens with that id come before it.
    """

    text: str
    begin: int
    end: int
    stop: int
    end_token: int
    number: int

    def begins(self, later: "Turn") -> bool:
        """Return whether a later turn's rendering starts with this one."""
        return later.text.startswith(self.text[: self.stop])

    def within(self, later: "Turn", controls: Sequence[Found]) -> "Turn | None":
        """Locate this turn in a later one's rendering; None if it is not there.

        The text before it may have changed, including what the template writes before it (some write an empty
        reasoning): the turn is identified by its own text and by the control token that ends it.

        Args:
            controls: the control tokens of the later rendering.
        """
        if self.begins(later):
            return replace(self, text=later.text)
        ends = [found for found in controls if found.token == self.end_token]
        end = ends[self.number] if self.number < len(ends) else None
        if end is None or not later.text[: end.start].endswith(self.text[self.begin : self.end]):
            return None
        return replace(self, text=later.text, begin=end.start - (self.end - self.begin), end=end.start, stop=end.end)


class Written(NamedTuple):
    """A chat as the template writes it.

    Attributes:
        items: control tokens by id, and the text between them; each message's parts have its number.
        contents: the bytes of each message; for a turn with more than contents, the text written for it, without
            control tokens.
        spoken: the messages whose bytes are to be supervised.
    """

    items: list[int | Part]
    contents: tuple[bytes, ...]
    spoken: frozenset[int]


def gathered(control: ControlTokens, numbers: Sequence[int], turns: Sequence[Turn]) -> list[dict[int, Turn]]:
    """Group turns, by number: a group's last rendering holds all of its turns in order."""
    groups: list[dict[int, Turn]] = []
    controls: list[Found] = []
    after: Turn | None = None  # the turn that comes next in the group's rendering
    for number, turn in zip(reversed(numbers), reversed(turns), strict=True):
        located = None if after is None else turn.within(after, controls)
        if located is None or after is None or located.end > after.begin:
            controls = list(control.find(turn.text[: turn.stop]))
            groups.append({})
            located = turn
        groups[-1][number] = after = located
    return [dict(reversed(group.items())) for group in reversed(groups)]


def items_of(control: ControlTokens, turns: Mapping[int, Turn]) -> tuple[list[int | Part], dict[int, str]]:
    """Split the rendering of these turns, up to the end of the last, into items.

    Also returns the text of each turn, without control tokens.
    """
    last = turns[max(turns)]
    items: list[int | Part] = []
    contents = dict.fromkeys(turns, "")
    at = 0
    for found in control.find(last.text[: last.stop]):
        items += _parts(last.text, at, found.start, turns, contents)
        items.append(found.token)
        at = found.end
    return items, contents


def _parts(text: str, start: int, stop: int, turns: Mapping[int, Turn], contents: dict[int, str]) -> Iterator[Part]:
    """Yield the text of these characters, cut where a turn begins or ends; append turns' parts to their contents."""
    for number, turn in turns.items():
        begin, end = max(start, turn.begin), min(stop, turn.end)
        if begin >= end:
            continue
        if start < begin:
            yield Part(mended(text[start:begin]), None)
        part = mended(text[begin:end])
        yield Part(part, number, len(contents[number].encode()))
        contents[number] += part
        start = end
    if start < stop:
        yield Part(mended(text[start:stop]), None)
