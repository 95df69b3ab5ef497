"""Put the kept results into docs/reliability.md: what `kills.py`, `processes.py`, `longrun.py`,
`streaming.py` and `overhead.py` wrote.

python benchmarks/reliability.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
NAMES = ("kills", "processes", "longrun", "streaming", "overhead")


def filled(text: str) -> str:
    """The page with the results as they are kept."""
    for name in NAMES:
        kept = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
        block = f"<!-- {name} -->\n{kept}<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
