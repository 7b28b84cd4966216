"""The host's part of the GPU ops on a GPU that is not there: fake tensors on a CUDA device, and launches that are looked at.

What a card would refuse is refused here: a tensor on the CPU, a grid that is too large, a size or a number that the host would
have to wait for, an integer product in a form that the library does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from qcompiler.ops.spec import Case, OpSpec

CUDA = torch.device("cuda", 0)
LARGEST_GRID = (2**31 - 1, 65535, 65535)
aten = torch.ops.aten


@contextmanager
def dry(monkeypatch: pytest.MonkeyPatch, launched: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> Iterator[None]:
    """Within it `launched(name of the kernel, its arguments and options)` is called in place of a launch."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from qcompiler.gpu import device, memory

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **given: Any) -> None:
        assert all(isinstance(g, int) and 0 < g <= most for g, most in zip(grid, LARGEST_GRID, strict=False)), grid
        values = dict(zip(self.arg_names, args, strict=False)) | given
        assert set(self.arg_names) <= set(values), self.fn.__name__
        for name, value in values.items():
            assert not isinstance(value, torch.Tensor) or value.device == CUDA, (self.fn.__name__, name, value.device)
        launched(self.fn.__name__, values)

    with monkeypatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", run)
        patch.setattr(device, "capability", lambda index: (9, 0))
        patch.setattr(device, "_name", lambda index: "Fake GPU")
        patch.setattr(device, "_processors", lambda index: 132)
        patch.setattr(memory, "apart", lambda make, place: make())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", lambda place: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with FakeTensorMode(), torch.no_grad(), _Ops():
            yield


class _Ops(TorchFunctionMode):
    """Calls that ask a device before they come to their op, as ops; integer products by the rules of the library for GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_:
            return aten.copy_.default(*args, **kwargs)
        if func is torch.Tensor.contiguous:
            return aten.contiguous.default(*args, **kwargs)
        if func is torch.Tensor.__setitem__:
            return aten.copy_.default(_part(args[0], args[1]), args[2])
        if func is torch.Tensor.__getitem__:
            return _part(*args)
        if func is torch._int_mm:
            _check_int_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _part(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]`."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(place for place, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *[slice(None)] * (tensor.dim() + 1 - sum(i is not None for i in index)), *index[at + 1 :])
    dim, chosen = 0, []
    for i in index:
        if i is None:
            tensor = aten.unsqueeze.default(tensor, dim)
        elif isinstance(i, slice):
            tensor = aten.slice.Tensor(tensor, dim, i.start, i.stop, i.step or 1)
        elif isinstance(i, int):
            tensor, dim = aten.select.int(tensor, dim, i), dim - 1
        else:
            assert i.dtype != torch.bool, "the host waits to know how many are chosen"
            chosen += [*[None] * (dim - len(chosen)), i]
        dim += 1
    return aten.index.Tensor(tensor, chosen) if chosen else tensor


def _check_int_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> None:
    """What torch asks for on a GPU, and cuBLAS: rows of a and columns of b one after another, multiples of 8."""
    assert a.dtype == b.dtype == torch.int8 and a.shape[1] == b.shape[0]
    assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
    assert out is None or (out.is_contiguous() and out.dtype == torch.int32 and out.shape == (a.shape[0], b.shape[1]))


def arguments(spec: OpSpec, case: Case, rows: int | None, dtype: torch.dtype) -> list[Any]:
    """The op's arguments on the GPU, x in the dtype; with as many rows, or those of the case."""
    given: list[Any] = []
    for declared in spec.inputs:
        value = case.inputs.get(declared.name)
        if value is None:
            given.append(None)
            continue
        shape, kind = value.shape, torch.from_numpy(np.empty(0, value.dtype)).dtype
        if rows is not None and declared.name in ("x", "residual", "expert", "indices"):
            shape = (rows, shape[-1]) if declared.name in ("x", "residual") else (rows,)
        given.append(torch.empty(shape, dtype=dtype if declared.name == "x" else kind, device=CUDA))
    return [*given, *spec.values(case.attributes)]
