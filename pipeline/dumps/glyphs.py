"""Display of a dump's bytes and text: on one line, without anything that a terminal or a page would act on.

The dump may come from someone else, so its text is not trusted.
"""

from schemas import END

_NAMES = {END: "END", 0x20: "␠", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}


def printable(text: str) -> str:
    """Return the text on one line, with unprintable and direction-changing characters shown as their code.

    It may come from someone else's dump.
    """
    return "".join(char if char.isprintable() else f"<{ord(char):x}>" for char in text)


def readable(text: bytes) -> str:
    """Return bytes as readable text on one line, with spaces, line breaks and unprintable characters as marks."""
    shown = text.decode("utf-8", errors="replace")
    marks = {" ": "␠", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    return "".join(marks.get(char) or (char if char.isprintable() else f"<{ord(char):x}>") for char in shown)


def symbol_name(symbol: int) -> str:
    """Return a symbol as readable text: `a`, `␠`, `\\n`, `c3`, `END`."""
    if symbol in _NAMES:
        return _NAMES[symbol]
    return chr(symbol) if 0x20 < symbol < 0x7F else f"{symbol:02x}"
