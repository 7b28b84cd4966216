"""Triton's interpreter with less to do for each operation: what it computes, and what it checks, stays the same.

Its time goes to Python objects that describe types: a kernel in float32 takes as long for 16 numbers as for 4096. Types are
never changed, so those of a name are made once.
"""

from __future__ import annotations

from typing import Any


def shorten() -> None:
    """Replaces, for the rest of the process, what the interpreter does again and again with one outcome."""
    import triton.language as tl
    from triton.runtime import interpreter

    # It puts its operators into `triton.language` anew in every call of a device function; once is enough.
    interpreter._patch_lang(tl.sum.fn)  # of triton.language.core, which no kernel's own module names
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    interpreter._get_np_dtype = _numpy_types(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _block_types(tl.core.block_type.__init__, tl.constexpr, tl.core._unwrap_if_constexpr)
    tl.core.tensor.__init__ = _tensors(tl.core.tensor.__init__)


def _numpy_types(make):
    known: dict[str, Any] = {}

    def numpy_type(type):
        name = type.scalar.name
        if name not in known:
            known[name] = make(type)
        return known[name]

    return numpy_type


def _block_types(make, constant, plain):
    known: dict[tuple, dict[str, Any]] = {}

    def block_type(self, element_ty, shape):
        sizes = [size.value if isinstance(size, constant) else size for size in plain(shape)]
        key = (element_ty.name, *sizes)
        if key in known:
            self.__dict__.update(known[key])
        else:
            make(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    return block_type


def _tensors(make):
    known: dict[str, tuple] = {}

    def tensor(self, handle, type):
        if type.name in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known[type.name]
        else:
            make(self, handle, type)
            known[type.name] = self.shape, self.numel

    return tensor
