"""Bytes and text of a dump for the eye, which may be of another's making: one line, nothing that a terminal or a page
acts upon.
"""

from schemas import END

_NAMES = {END: "END", 0x20: "␠", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}


def printable(text: str) -> str:
    """The text on one line; what prints nothing, or turns the direction of a line, as its code: it may come from a dump
    of another.
    """
    return "".join(char if char.isprintable() else f"<{ord(char):x}>" for char in text)


def readable(text: bytes) -> str:
    """Bytes on one line, for the eye: characters as they are, spaces and breaks and what prints nothing as marks."""
    shown = text.decode("utf-8", errors="replace")
    marks = {" ": "␠", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    return "".join(marks.get(char) or (char if char.isprintable() else f"<{ord(char):x}>") for char in shown)


def symbol_name(symbol: int) -> str:
    """A symbol to read: `a`, `␠`, `\\n`, `c3`, `END`."""
    if symbol in _NAMES:
        return _NAMES[symbol]
    return chr(symbol) if 0x20 < symbol < 0x7F else f"{symbol:02x}"
