"""`qcompiler_graph::experts_linear`: the float form of `linear_experts_nbit`, one node for what a mixture computes with a weight.

No ATen op takes rows with an expert each. `bmm(W[expert], x)` makes a copy of a matrix for every row; a grouped product wants
rows that are sorted, and offsets. The normalised graph holds this op instead, which runs in torch and lowers to ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

NAMESPACE = "qcompiler_graph"
_library = torch.library.Library(NAMESPACE, "DEF")


def rows_by_expert(expert: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that is hit, ascending, and its rows: indices, ascending.

    Args:
        expert: int64 `[rows]`.
        experts: how many there are.

    Raises:
        ValueError: an index outside `[0, experts)`.
    """
    order = torch.argsort(expert, stable=True)
    hit, counts = torch.unique_consecutive(expert[order], return_counts=True)
    if len(hit) and not (0 <= int(hit[0]) and int(hit[-1]) < experts):
        raise ValueError(f"expert indices lie in [{int(hit[0])}, {int(hit[-1])}], expected [0, {experts - 1}]")
    yield from zip(hit.tolist(), order.split(counts.tolist()), strict=True)


def experts_linear(
    x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y_i = W[expert_i] · x_i (+ bias[expert_i]), one expert's matrix at a time.

    Args:
        x: `[rows, k]`.
        expert: int64 `[rows]`.
        weight: `[experts, n, k]`; stored in half precision it is widened matrix by matrix.
        bias: `[experts, n]` or None.

    Returns:
        `[rows, n]`.
    """
    y = x.new_empty((x.shape[0], weight.shape[1]))
    for index, rows in rows_by_expert(expert, weight.shape[0]):
        own_bias = None if bias is None else bias[index].to(x.dtype)
        y[rows] = torch.nn.functional.linear(x[rows], weight[index].to(x.dtype), own_bias)
    return y


def _fake(x, expert, weight, bias=None):
    return x.new_empty((x.shape[0], weight.shape[1]))


def _save(ctx, inputs, output) -> None:
    _, expert, weight, _ = inputs
    ctx.save_for_backward(expert, weight)


def _backward(ctx, gradient: torch.Tensor):
    """Of x alone: what tunes the layers before a mixture. Its own matrices are constants."""
    if any(ctx.needs_input_grad[2:]):
        raise NotImplementedError("experts_linear has no gradient for its weight and bias, which are constants of a graph")
    expert, weight = ctx.saved_tensors
    result = gradient.new_empty((gradient.shape[0], weight.shape[2]))
    for index, rows in rows_by_expert(expert, weight.shape[0]):
        result[rows] = gradient[rows] @ weight[index].to(gradient.dtype)
    return result, None, None, None


_library.define("experts_linear(Tensor x, Tensor expert, Tensor weight, Tensor? bias=None) -> Tensor")
_library.impl("experts_linear", experts_linear, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::experts_linear", _fake, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::experts_linear", _backward, setup_context=_save, lib=_library)

EXPERTS_LINEAR: torch._ops.OpOverload = torch.ops.qcompiler_graph.experts_linear.default
