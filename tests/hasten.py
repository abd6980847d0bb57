"""Triton's interpreter made quicker, with the same results: for the time that tests take."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

Method = Callable[..., Any]


@cache
def hasten() -> None:
    """Leave out what the interpreter does for nothing (triton 3.6 to 3.9): half of its time.

    Each call of a device function goes through every member of triton.language to exchange those
    that the interpreter computes by itself, though the launch has done so. For each sum and product
    of integers it finds out whether they overflow, and then asks whether anyone wants to know,
    which is for `debug` alone. Each value's dtype is looked up in a new table.
    """
    patched: set[frozenset[str]] = set()
    interpreter._patch_lang = _once(interpreter._patch_lang, patched)
    launch = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = _forgetting(launch, patched)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)


def _once(patch: Method, patched: set[frozenset[str]]) -> Method:
    """`_patch_lang`, which does nothing where this launch has patched the same modules already."""

    @wraps(patch)
    def patch_lang(function: Any) -> Any:
        modules = _modules(function)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch(function)

    return patch_lang


@cache
def _modules(function: Any) -> frozenset[str]:
    """The modules among a function's globals that are patched for it."""
    mine = list(map(id, function.__globals__.values()))
    return frozenset(module.__name__ for module in (tl, tl.core) if id(module) in mine)


def _forgetting(launch: Method, patched: set[frozenset[str]]) -> Method:
    """A launch, which begins and ends with nothing patched."""

    @wraps(launch)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    return call


def _by_name(dtype_of: Method) -> Method:
    """numpy's dtype of a type of triton's, looked up once a name: those of blocks have no hash."""
    found: dict[str, Any] = {}

    @wraps(dtype_of)
    def by_name(of: Any) -> Any:
        if of.name not in found:
            found[of.name] = dtype_of(of)
        return found[of.name]

    return by_name
