"""What a function's bytecode can name, read without being run."""

from __future__ import annotations

import dis
import functools
import pathlib
import types
from typing import Any, NamedTuple

_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL")
_NOTHING = ("PUSH_NULL", "CACHE", "NOP", "PRECALL")


class Named(NamedTuple):
    """One name that code takes from outside of itself.

    Attributes:
        where: The function, line and file.
        how: "load" or "store" of a global, or "import" of a module.
        name: The global, or the module.
        attributes: What is read off a loaded global right away, ``name.first.second``.
        level: Of a relative import, the number of its dots.
    """

    where: str
    how: str
    name: str
    attributes: tuple[str, ...] = ()
    level: int = 0


@functools.lru_cache(maxsize=4096)  # bytecode never changes, and to take it apart costs more than to follow it
def named_in(code: types.CodeType) -> tuple[Named, ...]:
    """The globals and imports of code, in its order, without those of the code inside it.

    Example:
        >>> [(name.how, name.name, name.attributes) for name in named_in((lambda x: torch.nn.Linear(x, y)).__code__)]
        [('load', 'torch', ('nn', 'Linear')), ('load', 'y', ())]
    """
    found: list[Named] = []
    instructions = list(dis.get_instructions(code))
    file = pathlib.PurePath(code.co_filename).name
    line = code.co_firstlineno
    for number, instruction in enumerate(instructions):
        if instruction.starts_line is not None:
            line = _line_of(instruction, line)
        where = f"in {code.co_qualname}, line {line} of {file}"
        if instruction.opname in _LOADS:
            found.append(Named(where, "load", instruction.argval, _attributes(instructions, number + 1)))
        elif instruction.opname in _STORES:
            found.append(Named(where, "store", instruction.argval))
        elif instruction.opname == "IMPORT_NAME":
            level = instructions[number - 2].argval if number > 1 else 0
            found.append(Named(where, "import", instruction.argval, level=level if isinstance(level, int) else 0))
    return tuple(found)


def _attributes(instructions: list[Any], start: int) -> tuple[str, ...]:
    names = []
    for instruction in instructions[start:]:
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(instruction.argval)
        elif instruction.opname not in _NOTHING:
            break
    return tuple(names)


def _line_of(instruction: Any, line: int) -> int:
    number = getattr(instruction, "line_number", None)  # from Python 3.13 on, where starts_line is a switch
    return number if number is not None else instruction.starts_line if instruction.starts_line else line
