"""What our pages share: they are one file, and their content security policy lets a browser fetch nothing.

Style sheets and scripts are in `assets/`, and go into each page whole.
"""

import base64
import hashlib
import html
from functools import cache
from pathlib import Path

from pipeline.dumps.glyphs import printable
from schemas.json_text import json_text


@cache
def asset(name: str) -> str:
    """A style sheet or a script of `assets/`."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def shown(text: str) -> str:
    """`printable`, as text of a page."""
    return html.escape(printable(text))


def content_policy(script: str) -> str:
    """The policy of a page that runs this script and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def script_data(values: object) -> str:
    """JSON that may stand in a <script> element whatever is in it."""
    text = json_text(values, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
