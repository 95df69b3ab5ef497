"""Tables for papers: cells as LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def latex(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as a table of LaTeX with the rules of the package booktabs; the first line is the head.

    Args:
        lines: The head and the rows.
        left: Columns that are flush left; the others are flush right.
    Example:
        >>> print(latex([["guide", "k_ok"], ["a & b", "-1.2 ± 0.1"]]))
        \\begin{tabular}{lr}
        \\toprule
        guide & k\\_ok \\\\
        \\midrule
        a \\& b & $-1.2 \\pm 0.1$ \\\\
        \\bottomrule
        \\end{tabular}
    """
    head, *body = [" & ".join(map(_latex_cell, line)) + r" \\" for line in lines]
    form = "l" * left + "r" * (len(lines[0]) - left)
    rules = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(rules)


_ESCAPED = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def _latex_cell(text: str) -> str:
    if re.fullmatch(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ± \d[\d.]*)?", text):
        return f"${text.replace('±', chr(92) + 'pm')}$"
    escaped = "".join(_ESCAPED.get(each, each) for each in text)
    escaped = re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)  # a minus, and no hyphen
    return escaped.replace(">=", r"$\geq$").replace("±", r"$\pm$").replace("k̂", r"$\hat{k}$")


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """Names in a row, and how many more there are.

    Example:
        >>> listed("abc", 2)
        'a, b, and 1 more'
    """
    return between.join(names[:most]) + (f"{between}and {len(names) - most} more" if len(names) > most else "")


def aligned(lines: Sequence[Sequence[str]], left: int = 1, width: float = math.inf) -> list[str]:
    """Cells as lines of one length, the first columns flush left and the others flush right.

    The last columns are left out where the lines would be longer than `width`, but for the first two.

    Example:
        >>> aligned([["set", "bound"], ["test", "-1.2"]])
        ['set   bound', 'test   -1.2']
        >>> aligned([["set", "bound", "seconds"], ["test", "-1.2", "9"]], width=15)
        ['set   bound', 'test   -1.2']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{'<' if i < left else '>'}{width}" for i, width in enumerate(widths)]
    shown = len(widths)
    while shown > 2 and sum(widths[:shown]) + 2 * (shown - 1) > width:
        shown -= 1
    return ["  ".join(map(format, line[:shown], forms)) for line in lines]
