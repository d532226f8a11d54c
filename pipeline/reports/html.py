"""What our pages share: they are one file, and their content security policy lets a browser fetch nothing."""

import base64
import hashlib
import html

from schemas.json_text import json_text


def printable(text: str) -> str:
    """The text on one line; what prints nothing, or turns the direction of a line, as its code: it may come from a dump of another."""
    return "".join(char if char.isprintable() else f"<{ord(char):x}>" for char in text)


def shown(text: str) -> str:
    """`printable`, as text of a page."""
    return html.escape(printable(text))


def readable(text: bytes) -> str:
    """Bytes on one line, for the eye: characters as they are, spaces and breaks and what prints nothing as marks."""
    shown = text.decode("utf-8", errors="replace")
    marks = {" ": "␠", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    return "".join(marks.get(char) or (char if char.isprintable() else f"<{ord(char):x}>") for char in shown)


def content_policy(script: str) -> str:
    """The policy of a page that runs this script and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def script_data(values: object) -> str:
    """JSON that may stand in a <script> element whatever is in it."""
    text = json_text(values, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
