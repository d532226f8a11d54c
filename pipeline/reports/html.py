"""Common parts of the pages: each is one file, and its content security policy lets a browser load nothing.

Style sheets and scripts are in `assets/` and are copied into each page.
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
    """Read a style sheet or a script from `assets/`."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def html_text(text: str) -> str:
    """Return `printable` text, escaped for a page."""
    return html.escape(printable(text))


def content_policy(script: str) -> str:
    """Return the policy of a page that runs only this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def script_data(values: object) -> str:
    """Return JSON that is safe inside a <script> element, whatever it contains."""
    text = json_text(values, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
