"""How many bytes live on the device of `OtherDevice` at once, storage by storage."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree

from tests.sweep.other_device import OtherDevice, There


class Counted(OtherDevice):
    """Attributes:
    peak: the most bytes that lived there after an op; what an op holds inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, There):
                self._add(leaf.here.untyped_storage())
        if self._total > self.peak:
            # Only now is it worth while to look at what is gone.
            self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
            self._total = sum(size for _, size in self._held.values())
            self.peak = max(self.peak, self._total)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self._held.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._total += storage.nbytes() - (known[1] if known is not None else 0)
        self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def restart(self) -> int:
        """The peak so far; it begins anew."""
        peak, self.peak = self.peak, 0
        return peak
