"""Weights that stay in their files: loaded in the type they are stored in, captured through stand-ins, put back after."""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.core_model_loading as loading
from torch.nn import Module, Parameter


@contextlib.contextmanager
def as_stored() -> Iterator[set[int]]:
    """Inside, `from_pretrained(dtype=torch.float32)` leaves floating tensors in the type of the checkpoint.

    A tensor that needs no conversion is a view of the mapped file; one that does is a copy in memory. Everything else,
    names and merged or split weights among it, stays transformers' own affair.

    Yields:
        addresses of the tensors that were left as they are, filled while loading.
    """
    original = loading._materialize_copy
    addresses: set[int] = set()

    def materialize(tensor, device=None, dtype=None):
        stored = tensor[...]
        if dtype is torch.float32 and stored.is_floating_point():
            addresses.add(stored.data_ptr())
            return stored
        return original(tensor, device, dtype)

    loading._materialize_copy = materialize
    try:
        yield addresses
    finally:
        loading._materialize_copy = original


def widen_buffers(model: Module, addresses: set[int]) -> None:
    """Convert the buffers that `as_stored` left in another type to float32: only parameters are kept in their files."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype is not torch.float32 and buffer.data_ptr() in addresses:
                module._buffers[name] = buffer.float()


@dataclass
class StoredWeights:
    """Parameters of a module in the type that they are stored in, while float32 stand-ins take their places.

    A stand-in reads as zeros, takes no memory, and must not be written. Tied parameters have one.

    Attributes:
        by_address: of a stand-in -> the stored tensor.
    """

    by_address: dict[int, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_address)

    @staticmethod
    def stand_in(model: Module) -> StoredWeights:
        """Replace every floating parameter of `model` that is not float32."""
        stored, made = StoredWeights(), {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point() or parameter.dtype is torch.float32:
                    continue
                if parameter.numel() == 0:
                    module._parameters[name] = Parameter(parameter.detach().float(), requires_grad=False)
                    continue
                if id(parameter) not in made:
                    zeros = _untouched(parameter.shape)
                    made[id(parameter)] = Parameter(zeros, requires_grad=False)
                    stored.by_address[zeros.data_ptr()] = parameter.detach()
                module._parameters[name] = made[id(parameter)]
        return stored

    @contextlib.contextmanager
    def lent(self, model: Module) -> Iterator[None]:
        """Inside, `model` computes with its own weights: a module's are widened when it is called and dropped after.

        Tracing still sees the stand-ins; so does a module that reads another one's parameters.
        """
        handles = []
        for module in model.modules():
            held = {n: p for n, p in module._parameters.items() if p is not None and p.data_ptr() in self.by_address}
            if held:
                handles += self._lend(module, held)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _lend(self, module: Module, held: dict[str, Parameter]) -> list[Any]:
        def before(*_: object) -> None:
            if not torch.compiler.is_exporting():
                for name, parameter in held.items():
                    weight = self.by_address[parameter.data_ptr()].float()
                    module._parameters[name] = Parameter(weight, requires_grad=False)

        def after(*_: object) -> None:
            module._parameters.update(held)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def put_back(self, module: Module, *, widen: bool = False) -> None:
        """Replace the stand-ins in a captured module by what they stand for; ties stay ties.

        Args:
            widen: as float32, in memory, and not as it is stored.
        """
        made: dict[int, Parameter] = {}
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    address = tensor.data_ptr() if isinstance(tensor, torch.Tensor) else 0
                    if address in self.by_address:
                        if address not in made:
                            weight = self.by_address[address]
                            made[address] = Parameter(weight.float() if widen else weight, requires_grad=False)
                        table[name] = made[address]


def _untouched(shape: torch.Size) -> torch.Tensor:
    """Float32 zeros that are never written: read-only pages, all of them the system's one page of zeros."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # not a Unix
        return torch.zeros(shape)
    pages = mmap.mmap(-1, 4 * shape.numel(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the pages cannot be written is the point
        return torch.frombuffer(pages, dtype=torch.float32).reshape(shape)
