"""How a log p(x) may be quoted: the one rule, and the words; and how tables are written, for people and for papers.

Importance sampling may miss mass of the posterior; its error and its bias by the jackknife, of the same weights, have
then missed it as well. So a number that `kind_of` calls a lower bound prints as ``>= 2216.8``, without an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

# The share of the data whose k-hat must be good for their mean to be an estimate with an error.
TRUSTED = 0.9

Kind = Literal["estimate", "lower bound", "unchecked"]
Method = Literal["importance", "quadrature"]


def kind_of(khat_ok: float, method: str = "importance") -> Kind:
    """What a mean of log p(x) over data is, by the share of them whose k-hat is below `khat_limit`.

    The rule, for all data together: an estimate where the share is 0.9 or more, a lower bound where it is less, and
    unchecked where K is too small for a k-hat. Quadrature has no weights.

    Example:
        >>> kind_of(0.99), kind_of(0.23), kind_of(math.nan)
        ('estimate', 'lower bound', 'unchecked')
    """
    if method == "quadrature":
        return "estimate"
    if math.isnan(khat_ok):
        return "unchecked"
    return "estimate" if khat_ok >= TRUSTED else "lower bound"


def lower_bound(value: float) -> str:
    """A number that is one, in words: rounded down, so that it stays one.

    Example:
        >>> lower_bound(2216.89), lower_bound(-86.41), lower_bound(0.269)
        ('>= 2216.8', '>= -86.5', '>= 0.26')
    """
    if not math.isfinite(value):
        return f">= {value}"
    digits = 1 if abs(value) >= 10 else 2
    return f">= {math.floor(10**digits * value) / 10**digits:.{digits}f}"


def about_weights(khat_ok: float, num_samples: int, hat: str = "k̂", method: str = "importance") -> str:
    """What follows a log p(x): whether the weights of its importance sampling can be relied upon, or that it has none.

    Example:
        >>> about_weights(0.992, 100), about_weights(math.nan, 5), about_weights(math.nan, 41, method="quadrature")
        (', k̂ ok for 99.2 %', ', k̂ unknown at K = 5', ', by quadrature')
    """
    if method == "quadrature":
        return ", by quadrature"
    kind = kind_of(khat_ok)
    if kind == "unchecked":
        return f", {hat} unknown at K = {num_samples}"
    text = f", {hat} ok for {100 * khat_ok:.1f} %"
    if kind == "estimate":
        return text
    return text + " (a lower bound: the weights of the others miss mass; take more samples or enrich the guide)"


def over_data(data_stderr: float) -> str:
    """The error for the population in words; a single datum says nothing of others."""
    return "one datum" if math.isnan(data_stderr) else f"data ± {data_stderr:.2f}"


def latex(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a table of LaTeX with the rules of booktabs; the first line is the head, the first column flush left.

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
    form = "l" + "r" * (len(lines[0]) - 1)
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
