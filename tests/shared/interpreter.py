"""Triton's interpreter (seen in 3.6 and 3.9) without most of its work; it computes and refuses the same."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """Has the interpreter, where it is loaded, not do what has no effect, and not again what it has done.

    - For every sum and product of integers it computes in 64 bits whether 32 were too few, and then asserts
      it only with ``debug``, which is off.
    - At every call of a function under ``triton.jit`` in a kernel, such as ``tl.sum``, it searches the
      language's modules for what is to be replaced. After a launch's first call nothing is left.
    - It describes every block of numbers anew, and what type two of them make; there are few of either.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    with suppress(AttributeError, TypeError):  # a version that is made in another way takes longer
        _search_once_a_launch(interpreter, interpreter.GridExecutor)
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            builder.options = replace(builder.options, sanitize_overflow=False)
        _describe_once(interpreter.tl.core)
        interpreter._get_np_dtype = _numpy_types(interpreter._get_np_dtype)
        semantic = interpreter.TritonSemantic
        semantic.computation_type_impl = _computation_types(semantic.computation_type_impl)


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


def _describe_once(core: Any) -> None:
    """Has blocks of one shape share its description, which nothing changes."""
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}

    def describe_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(shape)
        if not all(type(size) is int for size in sizes):
            make_block(self, element_ty, shape)
            return
        key = (type(element_ty), element_ty.name, getattr(element_ty, "address_space", None), sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def describe_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            make_tensor(self, handle, type)
            if vars(self).keys() != {"handle", "shape", "numel", "type", "dtype"}:
                return
            shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    core.block_type.__init__, core.tensor.__init__ = describe_block, describe_tensor
    compare = core.tuple.__eq__

    def equal(self: Any, other: Any) -> Any:
        plain = type(other) is list and all(type(item) is int for item in (*self.values, *other))
        return core.constexpr(self.values == other) if plain else compare(self, other)

    core.tuple.__eq__ = equal


def _computation_types(find: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def find_once(self: Any, one: Any, one_scalar: Any, other: Any, other_scalar: Any, divides: Any) -> Any:
        key = (one.name, one_scalar, other.name, other_scalar, divides)
        if key not in known:
            known[key] = find(self, one, one_scalar, other, other_scalar, divides)
        return known[key]

    return find_once


def _numpy_types(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def find_once(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    return find_once
