"""Which of transformers' implementations computes a mixture's experts while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# One row, one matrix, picked by the row's index: no sorting, no offsets, no inverse permutation around it. What it copies
# while it runs does not matter: it is only traced, and the graph's passes take the copies out.
TRACED = "batched_mm"


@contextlib.contextmanager
def experts_by_row(module: Any) -> Iterator[None]:
    """Run the experts of a transformers model by rows inside the block; a model that cannot be told keeps its own way."""
    can_be_set = getattr(module, "_can_set_experts_implementation", None)
    if can_be_set is None or not can_be_set():
        yield
        return
    own = module.get_experts_implementation()
    module.set_experts_implementation(TRACED)
    try:
        yield
    finally:
        module.set_experts_implementation(own)
