"""How transformers writes a mask out while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import masking_utils
from transformers.exporters.utils import patch_attributes


@contextlib.contextmanager
def broadcast_masks() -> Iterator[None]:
    """Inside the block masks of a model's own functions are broadcast from indices, not mapped over them one by one.

    Such a map (`vmap`) leaves steps in a trace that mean nothing outside of it, and so does the way of indexing that it needs
    (`ModIndex`). transformers' exporter to ONNX broadcasts what it traces, and keeps that way of indexing; the one to torch does
    neither. With this both give passes one graph, of plain operators.
    """
    patches = [
        (masking_utils, "_vmap_expansion_sdpa", lambda _: _broadcast),
        (masking_utils, "TransformGetItemToIndex", lambda _: contextlib.nullcontext),
    ]
    with patch_attributes(patches):
        yield


def _broadcast(mask_function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def expanded(*indices: torch.Tensor) -> torch.Tensor:
        mask = mask_function(*masking_utils._non_vmap_expansion_sdpa(*indices))
        return mask.expand([index.shape[0] for index in indices])

    return expanded
