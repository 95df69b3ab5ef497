"""The page as one file: markup, style and script with the payload in them.

The page may run this script, known by its hash, and use this style; it may load nothing, from anywhere. What comes
from data stands in an element of type application/json, which runs nothing and in which no "<" is left, and the script
writes it as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path
from typing import Any

LIMIT = 5_000_000  # bytes that a page of the default run has at most
_PARTS = Path(__file__).parent


def page(shown: dict[str, Any], arrays: str) -> str:
    """The file's text, from what `payload` gives."""
    parts = {name: (_PARTS / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    data = json.dumps(shown, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    policy = (
        f"default-src 'none'; script-src {_hash(parts['js'])}; style-src {_hash(parts['css'])}; base-uri 'none'; "
        "form-action 'none'"
    )
    filled = {
        "title": escape(str(shown["title"])), "policy": policy, "style": parts["css"], "script": parts["js"],
        "data": data, "arrays": arrays,
    }  # fmt: skip
    # In one pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], parts["html"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
