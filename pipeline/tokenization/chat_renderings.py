"""Turns of a chat that one rendering shows, and that rendering as control tokens and the text between them.

A turn is found in the rendering of a later one, where the template writes it there as it did when it came.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.tokenization.chat_template import Part
from pipeline.tokenization.control_tokens import ControlTokens, Found, mended


@dataclass(frozen=True)
class Turn:
    """A chat rendered up to a turn, which is characters `begin .. end` of it, and ends with the control token
    `end_token` up to `stop`.

    Attributes:
        text: the rendering, in which spellings of control tokens are broken.
        number: how many such control tokens stand before that one.
    """

    text: str
    begin: int
    end: int
    stop: int
    end_token: int
    number: int

    def begins(self, later: "Turn") -> bool:
        """Whether a later turn's rendering holds this one as it is."""
        return later.text.startswith(self.text[: self.stop])

    def within(self, later: "Turn", controls: Sequence[Found]) -> "Turn | None":
        """Where this turn stands in a later one's rendering, whose control tokens these are; None where it does not.

        What comes before it may have changed, and so may what the template writes before it (an empty reasoning, by
        some): the turn is known by its text, and by the control token that ends it.
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
        items: control tokens by id, and what stands between them; each message's parts have its number.
        contents: of each message its bytes: of a turn with more than contents what is written for it, without control
            tokens.
        spoken: the messages whose bytes are to be supervised.
    """

    items: list[int | Part]
    contents: tuple[bytes, ...]
    spoken: frozenset[int]


def gathered(control: ControlTokens, numbers: Sequence[int], turns: Sequence[Turn]) -> list[dict[int, Turn]]:
    """Turns by number, in groups: those before the last of a group stand in its rendering, after one another."""
    groups: list[dict[int, Turn]] = []
    controls: list[Found] = []
    after: Turn | None = None  # the turn that comes next in the group's rendering
    for number, turn in zip(reversed(numbers), reversed(turns), strict=True):
        found = None if after is None else turn.within(after, controls)
        if found is None or after is None or found.end > after.begin:
            controls = list(control.find(turn.text[: turn.stop]))
            groups.append({})
            found = turn
        groups[-1][number] = after = found
    return [dict(reversed(group.items())) for group in reversed(groups)]


def items_of(control: ControlTokens, turns: Mapping[int, Turn]) -> tuple[list[int | Part], dict[int, str]]:
    """The rendering that holds these turns, up to the end of the last, and what it has of each, without control
    tokens.
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
    """What stands at these characters, cut where a turn begins or ends; the turns' parts are put to their contents."""
    for number, turn in turns.items():
        begin, end = max(start, turn.begin), min(stop, turn.end)
        if begin >= end:
            continue
        if start < begin:
            yield Part(mended(text[start:begin]), None)
        said = mended(text[begin:end])
        yield Part(said, number, len(contents[number].encode()))
        contents[number] += said
        start = end
    if start < stop:
        yield Part(mended(text[start:stop]), None)
