"""Read an einsum equation of an input and a matrix."""

from __future__ import annotations


def contraction(equation: str) -> bool | None:
    """Whether the matrix is `[k, n]` (True) or `[n, k]` (False) in a product over the input's last axis.

    `...k,nk->...n` and `bsk,nk->bsn` are False, `bsk,kn->bsn` is True, everything else is None.
    """
    left, arrow, output = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        return None
    x, weight = operands
    if len(weight) != 2 or weight[0] == weight[1] or "." in weight or not x or not output:
        return None
    k, n = x[-1], output[-1]
    if x[:-1] != output[:-1] or k in x[:-1] or n in x or set(weight) != {k, n}:
        return None
    return weight[0] == k
