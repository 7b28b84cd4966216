"""The forms in which graphs write rows times the constant matrices of their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import Node

from qcompiler.graph.constants import TRANSPOSING, Constant, constant_of
from qcompiler.graph.edit import args

aten = torch.ops.aten

_SAME = frozenset({aten.alias.default, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default})
_ONES = frozenset({aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default})

Form: TypeAlias = Literal["rows", "left", "right"]


@dataclass(frozen=True)
class ExpertsProduct:
    """y_i = W[expert_i] · x_i, as the graph has it.

    Attributes:
        x: what holds the rows.
        weight: the constant, `[experts, n, k]`, or `[experts, k, n]` where `transposed`.
        index: int64 `[rows]`, or None.
        offsets: ends of the experts' rows in `x`, `[experts]`, where there is no index. Without either, batch i of x is for
            expert i.
        form: of x and the result: `rows` is `[rows, k]` to `[rows, n]`; `left` is `[rows, 1, k]` to `[rows, 1, n]`, or
            `[experts, m, k]` to `[experts, m, n]`; `right` is `[rows, k, 1]` to `[rows, n, 1]`, or `[experts, k, m]` to
            `[experts, n, m]`.
    """

    x: Node
    weight: Constant
    transposed: bool
    index: Node | None = None
    offsets: Node | None = None
    form: Form = "rows"


def experts_product(node: Node) -> ExpertsProduct | str | None:
    """What the node computes, or why it stays as it is, or None where no stack of constant matrices is involved."""
    if node.op != "call_function":
        return None
    if is_grouped(node):
        found = _grouped(node)
    elif node.target in (aten.bmm.default, aten.matmul.default):
        found = _batched(*args(node)[:2])
    elif node.target is aten.einsum.default and len(args(node)[1]) == 2:
        found = _einsum(str(args(node)[0]), *args(node)[1])
    else:
        return None
    if isinstance(found, ExpertsProduct) and not found.x.meta["val"].dtype.is_floating_point:
        return f"constant {found.weight.name} meets {found.x.meta['val'].dtype}"
    return found


def is_grouped(node: Node) -> bool:
    """A product of groups of rows with a matrix each; PyTorch and transformers have one under different names."""
    return isinstance(node.target, torch._ops.OpOverload) and "grouped_mm" in node.target._schema.name


def _grouped(node: Node) -> ExpertsProduct | str | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    given: dict[str, Any] = dict(zip(names, args(node), strict=False)) | dict(node.kwargs)
    x, matrices, offsets, *others = [*given.values(), None, None, None][: max(3, len(given))]
    weight = constant_of(matrices)
    if weight is None:
        return None
    if offsets is None or x.meta["val"].dim() != 2 or matrices.meta["val"].dim() != 3:
        return f"grouped product with {weight.name}: expected rows [rows, k], matrices [experts, k, n] and offsets"
    if any(value is not None and value is not x.meta["val"].dtype for value in others):
        return f"grouped product with {weight.name} takes more than rows, matrices and offsets"
    return ExpertsProduct(x, weight, True, _sorted_index(offsets, matrices.meta["val"].shape[0]), offsets)


def _sorted_index(offsets: Node, experts: int) -> Node | None:
    """The sorted indices that offsets were counted from: cumsum(histc(indices, experts, 0, experts - 1))."""
    if offsets.target is not aten.cumsum.default:
        return None
    counts = args(offsets)[0]
    if counts.target is not aten.histc.default or [*args(counts)[1:]] != [experts, 0, experts - 1]:
        return None
    value = args(counts)[0]
    while value.target in _SAME:
        value = args(value)[0]
    source = args(value)[0] if getattr(value.target, "__name__", "") == "getitem" and args(value)[1] == 0 else None
    ascending = source is not None and source.target is aten.sort.default and args(source)[1:] in ((), (0,), (-1,))
    return value if ascending and value.meta["val"].dtype == torch.int64 and value.meta["val"].dim() == 1 else None


def _batched(left: Node, right: Node) -> ExpertsProduct | str | None:
    if not all(isinstance(v, Node) and v.meta["val"].dim() == 3 for v in (left, right)):
        return None
    forms: tuple[tuple[Node, Node, Form], ...] = ((left, right, "left"), (right, left, "right"))
    for x, matrices, form in forms:
        found = picked(matrices)
        if found is not None:
            stack, swapped, index = found
            if x.meta["val"].shape[1 if form == "left" else 2] != 1:
                return f"a matrix of {stack.name} is picked for several rows at once; expected one row each"
            return ExpertsProduct(x, stack, swapped != (form == "left"), index, None, form)
        weight = constant_of(matrices)
        if weight is not None:
            if constant_of(x) is not None:
                return f"both factors are constants: {weight.name}"
            return ExpertsProduct(x, weight, form == "left", form=form)
    return None


def _einsum(equation: str, x: Node, matrices: Node) -> ExpertsProduct | None:
    """`bk,bnk->bn` with picked matrices, `ebk,enk->ebn` with all of them; either with n and k of the matrices swapped."""
    left, _, result = equation.replace(" ", "").partition("->")
    rows, own = left.split(",")
    if len(rows) not in (2, 3) or len({*rows, *own}) != len(rows) + 1 or len(own) != 3 or rows[0] != own[0]:
        return None
    if rows[-1] not in own[1:] or result != rows[:-1] + own[1:].replace(rows[-1], ""):
        return None
    transposed = own[1] == rows[-1]
    found, weight = picked(matrices), constant_of(matrices)
    if found is not None and len(rows) == 2:
        return ExpertsProduct(x, found[0], found[1] != transposed, found[2])
    if weight is not None and len(rows) == 3 and matrices.meta["val"].dim() == 3:
        return ExpertsProduct(x, weight, transposed, form="left")
    return None


def picked(matrices: Node) -> tuple[Constant, bool, Node] | None:
    """A stack of constant matrices of which a 1-D index picks one for each row: (stack, whether picked and swapped, index)."""
    swapped, node = False, matrices
    while node.op == "call_function" and node.target in TRANSPOSING | _SAME:
        if node.target in TRANSPOSING:
            if not _swaps_last(node):
                return None
            swapped = not swapped
        node = args(node)[0]
    found = picked_rows(node)
    return None if found is None or node.meta["val"].dim() != 3 else (found[0], swapped, found[1])


def picked_rows(node: Node) -> tuple[Constant, Node] | None:
    """`(constant, index)` where the node is the constant at a computed 1-D int64 index of axis 0."""
    if node.op != "call_function" or not args(node):
        return None
    if node.target is aten.index.Tensor and len(args(node)[1]) == 1:
        index = args(node)[1][0]
    elif node.target is aten.index_select.default and args(node)[1] == 0:
        index = args(node)[2]
    else:
        return None
    constant = constant_of(args(node)[0])
    value: Any = index.meta.get("val") if isinstance(index, Node) else None
    if constant is None or value is None or value.dim() != 1 or value.dtype is not torch.int64:
        return None
    return constant, index


def without_ones(node: Node) -> Node | None:
    """The node's only user where that takes the axis of size 1 out of `[rows, 1, n]` or `[rows, n, 1]`."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target not in _ONES | {aten.view.default, aten.reshape.default}:
        return None
    before, after = node.meta["val"].shape, user.meta["val"].shape
    kept = [size for axis, size in enumerate(before) if axis == 0 or not (isinstance(size, int) and size == 1)]
    return user if len(after) == 2 and [*map(str, after)] == [*map(str, kept)] else None


def bias_after(node: Node, index: Node | None) -> tuple[Node, Constant] | None:
    """The addition of a bias `[experts, n]`, picked by the same index, that is all that becomes of the node."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or index is None or user.target not in (aten.add.Tensor, aten.add_.Tensor):
        return None
    first, second = args(user)[:2]
    if user.kwargs.get("alpha", 1) != 1 or node not in (first, second) or first is second:
        return None
    other = second if first is node else first
    found = picked_rows(other) if isinstance(other, Node) else None
    if found is None or found[1] is not index or other.meta["val"].dim() != 2 or found[0].chain:
        return None
    same = [*map(str, other.meta["val"].shape)] == [*map(str, node.meta["val"].shape)]
    return (user, found[0]) if same else None


def _swaps_last(node: Node) -> bool:
    """Whether a transposing op on three axes swaps the last two."""
    if node.meta["val"].dim() != 3:
        return False
    if node.target is aten.permute.default:
        return [axis % 3 for axis in args(node)[1]] == [0, 2, 1]
    if node.target is aten.transpose.int:
        return {args(node)[1] % 3, args(node)[2] % 3} == {1, 2}
    return node.target is aten.mT.default
