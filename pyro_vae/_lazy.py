"""Packages that hand on names of their modules, and import a module when one of its names is first used.

A package lists its names once, as imports that a type checker reads and Python never runs:

    if TYPE_CHECKING:
        from pyro_vae.judging._gaps import gaps as gaps
    else:
        __getattr__, __dir__, __all__ = attach(__name__)

`attach` reads these lines from the source, so that ``import pyro_vae`` need not wait for torch.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def listed(source: str) -> dict[str, tuple[str, str]]:
    """The names that a module's source imports for type checkers only: for each, its module and its name there.

    Example:
        >>> listed("if TYPE_CHECKING:\\n    from pyro_vae.inference import bounds as bounds")
        {'bounds': ('pyro_vae.inference', 'bounds')}
    """
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module is not None:
                    found |= {alias.asname or alias.name: (line.module, alias.name) for alias in line.names}
    return found


def attach(module: str, *own: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a module that hands on what it lists, and names of its `own`.

    A module without its source, which lists them, is an ImportError.
    """
    here = sys.modules[module]
    loader: Any = here.__spec__.loader if here.__spec__ is not None else None
    source = loader.get_source(module) if loader is not None else None
    if source is None:
        raise ImportError(f"got no source of {module}, wanted its .py file, which lists its names. Use pip.")
    home = listed(source)
    names = sorted({*home, *own})

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name, obj=here)
        at, there = home[name]
        held = None if at == module else getattr(import_module(at), there, None)
        value = import_module(f"{at}.{there}") if held is None else held  # no attribute: a module of the package
        setattr(here, name, value)
        return value

    def names_of() -> list[str]:
        return sorted({*names, *(name for name in vars(here) if name.startswith("__"))})

    return get, names_of, names
