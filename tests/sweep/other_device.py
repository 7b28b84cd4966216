"""A second device without a second device: `OtherDevice` lets torch's name `meta` stand for one that computes.

Tensors moved to it are wrapped; an op that meets a wrapped tensor and one that nobody moved is an error, as it is on a GPU.
Numbers are computed by the same kernels of the CPU, so results must be equal to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "meta"
_aten = torch.ops.aten
# What a GPU takes from both sides.
_TRANSFERS = (_aten._to_copy.default, _aten.copy_.default)


class There(torch.Tensor):
    """A tensor on the other device; `here` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=NAME
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor on the other device, outside of it")

    def tolist(self) -> Any:
        return self.here.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.here, spec)

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on the other device has no array; use .cpu() first")

    def data_ptr(self) -> int:
        return self.here.data_ptr()


class _Constants(TorchFunctionMode):
    """`torch.tensor`, and lists as indices, copy their numbers past every dispatch: they are made here, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and str(kwargs.get("device")) == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(NAME)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], There):
            listed = lambda i: torch.tensor(list(i), device="cpu").to(NAME) if isinstance(i, (list, range)) else i  # noqa: E731
            index = tuple(map(listed, args[1])) if isinstance(args[1], tuple) else listed(args[1])
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """Within it, device `meta` computes.

    Attributes:
        ops: how many ops ran there, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, int] = {}
        self._constants = _Constants()

    def __enter__(self) -> OtherDevice:
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._constants.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [leaf for leaf in leaves if isinstance(leaf, There)]
        if any(leaf.is_meta and not isinstance(leaf, There) for leaf in leaves):
            raise AssertionError(f"{func}: a tensor that was made past the mode has no numbers")
        left = [leaf for leaf in leaves if not isinstance(leaf, There) and leaf.dim() > 0]
        if there and left and func not in _TRANSFERS:
            shapes = [list(leaf.shape) for leaf in left]
            raise AssertionError(f"{func}: tensors of shape {shapes} were not moved to where the others are")
        device = kwargs.get("device")
        onto = (str(device) == NAME) if device is not None else bool(there)
        if func is _aten.copy_.default:
            onto = isinstance(args[0], There)
        generator = kwargs.get("generator")
        if onto and generator is not None:
            raise AssertionError(f"{func}: a generator of the CPU does not draw on another device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        back = {id(leaf.here): leaf for leaf in there}
        bare = lambda leaf: leaf.here if isinstance(leaf, There) else leaf  # noqa: E731
        result = func(*_pytree.tree_map(bare, args), **_pytree.tree_map(bare, kwargs))
        if onto:
            name = str(func)
            self.ops[name] = self.ops.get(name, 0) + 1

        def dress(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not onto:
                return leaf
            return back[id(leaf)] if id(leaf) in back else There(leaf)

        return _pytree.tree_map(dress, result)
