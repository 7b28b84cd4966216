"""Programs on a GPU that is not there: torch's fake tensors have a device, a type and a shape, and no numbers.

Within `Watch` every op is looked at: a tensor that was left on the CPU or is made there, a copy between the devices, a number or
a size that the host has to wait for. Each of them ends the capture of a CUDA graph, and most of them the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.ops.attention import ATTENTION, _elsewhere
from qcompiler.runtime.artifact import TensorInfo, open_artifact
from qcompiler.runtime.precision import input_dtype, narrow
from qcompiler.runtime.relocate import relocate
from qcompiler.runtime.static_cache import Refused, static_program
from qcompiler.runtime.static_module import StaticModule
from qcompiler.runtime.torch_program import TorchProgram

CUDA = torch.device("cuda:0")
CAPACITY = 16


class Found(AssertionError):
    """What would fail on a GPU, or make the host wait for it."""


class Watch(TorchDispatchMode):
    """Every op takes and gives tensors of the GPU alone.

    Attributes:
        ops: how many ops ran, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse(func, "takes", (args, kwargs))
        self.ops[str(func)] = self.ops.get(str(func), 0) + 1
        try:
            result = func(*args, **(kwargs or {}))
            if func is ATTENTION:  # what it is made of there
                with self, _Ops():
                    _elsewhere(*args)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Found(f"{func}: the host waits for what it finds") from error
        _refuse(func, "gives", result)
        return result


def _refuse(func: Any, does: str, values: Any) -> None:
    for leaf in _pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.device != CUDA:
            raise Found(f"{func} {does} a tensor {list(leaf.shape)} on {leaf.device}")


class _Ops(TorchFunctionMode):
    """Methods that ask for the device before they come to their op; the op does not."""

    OP = {torch.Tensor.copy_: torch.ops.aten.copy_.default, torch.Tensor.contiguous: torch.ops.aten.contiguous.default}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.OP.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within it tensors have no numbers, and there is a GPU."""
    with FakeTensorMode() as mode, torch.no_grad(), _Ops():
        yield mode


def on_fake_cuda(module: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
    """Move a loaded program, in place, by what moves it on a machine with a GPU."""
    for owner in module.modules():
        # As buffers: a parameter without numbers cannot be moved in place.
        owner._buffers |= owner._parameters
        owner._parameters.clear()
        for held in (owner._buffers, vars(owner)):
            held |= {name: mode.from_tensor(value) for name, value in held.items() if isinstance(value, torch.Tensor)}
    relocate(module, CUDA)


Plant = Callable[[torch.fx.GraphModule], None]


def watched(path: Path, dtype: torch.dtype = torch.float32, plant: Plant = lambda _: None) -> Watch:
    """Run an artifact of target `torch` as a session does on a GPU: of a decoder some tokens, then one.

    Args:
        path, dtype: the artifact, and the type of its float activations.
        plant: called with the program that runs, when it is where it should be.

    Raises:
        Found: an op that a GPU, or the capture of a CUDA graph, does not take.
    """
    artifact = open_artifact(path)
    module, watch = TorchProgram(artifact, 1).module, Watch()
    if dtype != torch.float32:
        narrow(module, dtype, artifact)
    with fake_cuda() as mode:
        on_fake_cuda(module, mode)
        infos = {info.name: info for info in artifact.inputs}
        try:
            static = static_program(module, artifact, CUDA) if artifact.cache is not None else None
        except Refused:  # its cache grows
            static = None
        plant(module if static is None else static.module)
        (module if static is None else static.module).recompile()
        if static is None:
            with watch:
                module(*(_input(info, _Sizes(7, past=4), dtype) for info in artifact.inputs))
            return watch
        assert artifact.cache is not None
        whole = StaticModule(static, [_input(infos[past], _Sizes(0, past=CAPACITY), dtype) for past in static.pasts])
        for count in (artifact.cache.step or 5, 1):
            tokens, filled = (torch.zeros(shape, dtype=torch.int64, device=CUDA) for shape in ((1, count), ()))
            with watch:
                logits = whole(tokens, filled)
            assert logits.device == CUDA and logits.shape[:2] == (1, count)
    return watch


class _Sizes(dict[str, int]):
    """Sizes of free axes: of a text `size`, with `past` before it; of a batch 1."""

    def __init__(self, size: int, past: int = 0) -> None:
        super().__init__(batch=1, past_length=past, total_length=past + size)
        self._size = size

    def __missing__(self, name: str) -> int:
        return self._size


def _input(info: TensorInfo, sizes: _Sizes, dtype: torch.dtype) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in info.shape]
    stored = getattr(torch, info.dtype)
    return torch.zeros(shape, dtype=input_dtype(info, stored, dtype), device=CUDA)

