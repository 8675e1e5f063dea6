"""What stands for a pass in the compile-cache key: its source, and the values that it was made with.

A pass that closes over 3 is not the one that closes over 4, though their source is the same.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum, slice, range, Path)
_TORCH = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)

_FIXED = {"epops", "torch", *sys.stdlib_module_names}

Seen = dict[int, tuple[int, Any]]
"""id of what was met → its number, and itself, so that nothing else gets its id meanwhile."""


class _Unknown(Exception):
    """Something that no text stands for."""


def identity(entry: Any) -> str | None:
    """The same text for passes that do the same, in every process; None where that cannot be told, so that nothing is cached.

    An object with a ``uuid()``, as Inductor's own passes have, says it itself.

    >>> def adds(number):
    ...     return lambda graph: number
    >>> identity(adds(3)) == identity(adds(3)), identity(adds(3)) == identity(adds(4))
    (True, False)
    """
    try:
        return "\n".join(_parts(entry, {}))
    except _Unknown:
        return None


def _parts(item: Any, seen: Seen) -> Iterator[str]:
    if isinstance(item, (*_PLAIN, *_TORCH)):
        yield f"{type(item).__qualname__} {item!r}"
        return
    if id(item) in seen:
        yield f"again {seen[id(item)][0]}"
        return
    seen[id(item)] = (len(seen), item)
    yield type(item).__qualname__
    if isinstance(item, (tuple, list)):
        yield str(len(item))
        for part in item:
            yield from _parts(part, seen)
    elif isinstance(item, (set, frozenset)):
        yield from sorted("\n".join(_parts(part, {})) for part in item)
    elif isinstance(item, dict):
        yield from _parts(list(item.items()), seen)
    elif isinstance(item, functools.partial):
        yield from _parts([item.func, item.args, item.keywords, vars(item)], seen)
    elif isinstance(item, types.MethodType):
        yield from _parts([item.__func__, item.__self__], seen)
    elif isinstance(item, types.FunctionType):
        yield from _function(item, seen)
    elif isinstance(item, types.CodeType):
        yield from _parts([item.co_code, item.co_names, item.co_varnames, item.co_consts], seen)
    elif isinstance(item, (types.BuiltinFunctionType, types.ModuleType)):
        yield f"{getattr(item, '__module__', '')}.{item.__name__}"
    elif isinstance(item, type):
        yield f"{item.__module__}.{item.__qualname__}"
        for base in item.__mro__[:-1]:
            yield from _source(base, seen)
    elif callable(getattr(item, "uuid", None)):
        yield from _parts(_known(item.uuid()), seen)
    else:
        yield from _parts([type(item), _known(getattr(item, "__dict__", None))], seen)


def _function(function: types.FunctionType, seen: Seen) -> Iterator[str]:
    """Its module's source where there is one, its code, its defaults, what it closes over and its attributes; and of the globals
    that it names, plain values, and functions likewise: those of this package, torch and Python stay what they are."""
    yield f"{function.__module__}.{function.__qualname__}"
    try:
        yield from _source(function, seen)
    except _Unknown:
        yield "no source"
    empty = types.CellType()
    kept = [cell.cell_contents for cell in function.__closure__ or () if cell != empty]
    yield from _parts([function.__code__, function.__defaults__, function.__kwdefaults__, kept, vars(function)], seen)
    for name in _names(function.__code__):
        other = function.__globals__.get(name)
        if isinstance(other, _PLAIN) and name in function.__globals__:
            yield from _parts([name, other], seen)
        elif isinstance(other, types.FunctionType) and _package(other) not in _FIXED:
            yield from _parts(other, seen)


def _names(code: types.CodeType) -> list[str]:
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return sorted({*code.co_names, *inner})


def _package(function: types.FunctionType) -> str:
    return str(function.__module__).partition(".")[0]


def _source(item: Any, seen: Seen) -> Iterator[str]:
    """Source of the module that something is from."""
    module = inspect.getmodule(item)
    if id(module) in seen:
        yield f"again {seen[id(module)][0]}"
        return
    try:
        yield inspect.getsource(module or item)
    except (OSError, TypeError) as error:
        raise _Unknown from error
    if module is not None:
        seen[id(module)] = (len(seen), module)


def _known(item: Any) -> Any:
    if item is None:
        raise _Unknown
    return item
