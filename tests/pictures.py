"""Pictures are drawn where a test looks at them; elsewhere their files are blank, for they are half of a small run's time.

All else of a figure is made. What only drawing finds out (a character that a font lacks, a formula that is none) is found
where pictures are looked at: each kind of them is, in some test that is marked.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

looked_at = False


def leave_out() -> None:
    """Files of figures are blank from now on, where nothing looks at them."""
    from matplotlib.figure import Figure

    own = Figure.savefig
    if hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def savefig(figure: Figure, place: Any, *, format: str | None = None, **options: Any) -> None:
        if looked_at:
            own(figure, place, format=format, **options)
        else:
            own(Figure((1, 1)), place, format=format, dpi=20)

    Figure.savefig = savefig  # type: ignore[method-assign]


@contextlib.contextmanager
def drawn() -> Iterator[None]:
    """They are drawn in there: for a fixture of several tests, of which one looks at them."""
    global looked_at
    before, looked_at = looked_at, True
    try:
        yield
    finally:
        looked_at = before
