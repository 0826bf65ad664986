"""Triton's interpreter (seen in 3.6 and 3.9) without half of its work; it computes and refuses the same."""

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """Has the interpreter, where it is loaded, not do what has no effect.

    - For every sum and product of integers it computes in 64 bits whether 32 were too few, and then asserts
      it only with ``debug``, which is off.
    - At every call of a function under ``triton.jit`` in a kernel, such as ``tl.sum``, it searches the
      language's modules for what is to be replaced. After a launch's first call nothing is left.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    with suppress(AttributeError, TypeError):  # a version that is made in another way takes longer
        _search_once_a_launch(interpreter, interpreter.GridExecutor)
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            builder.options = replace(builder.options, sanitize_overflow=False)


def _search_once_a_launch(interpreter: Any, executor: Any) -> None:
    search, launch = interpreter._patch_lang, executor.__call__
    done: set[int] = set()  # modules, by their globals, that the launch has searched for

    def search_once(function: Any) -> Any:
        if id(function.__globals__) in done:
            return None
        done.add(id(function.__globals__))
        return search(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        done.clear()
        try:
            launch(self, *args, **options)
        finally:
            done.clear()  # the launch has put everything back

    interpreter._patch_lang, executor.__call__ = search_once, launch_anew
