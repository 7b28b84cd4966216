"""The function body of our attention: its arithmetic (docs/layout.md, "Attention") in standard ops, to the bit.

What holds it to the bit: a product of matrices whose inner side is short is, in ONNX Runtime, one chain of fused multiply-adds
an element, in order. So lane i of a score is a product over the columns i, i + 16, ..., and the values of a block of 128
positions one over its positions. Rows are made two at least, and positions a whole block: single ones take another path there.
A fused multiply-add elsewhere is one in double precision, rounded to float32 once more: another number once in 2^29 times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ops.body_builder import STANDARD_OPSET, Body, marker
from qcompiler.ops.spec import DOMAIN

BLOCK, LANES = 128, 16
_LARGE = 1 << 62
# e^x = 2^n · p(r): the kernel's constants (runtime/cpu/attention_vector.h).
_ROUND, _LOG2_E, _LN2, _LN2_REST = (float.fromhex(c) for c in ("0x1.8p+23", "0x1.715476p+0", "-0x1.62e430p-1", "0x1.05c610p-29"))
_POLYNOMIAL = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_LOWEST = -87.0


def attention_body(
    name: str,
    variant: str,
    inputs: Sequence[str],
    given: Collection[str],
    attributes: Mapping[str, int | float],
    rotary: bool,
    interleaved: bool,
) -> ir.Function:
    """The body for nodes with the inputs `given`.

    Args:
        name: of the op.
        inputs: names of all inputs, in order; those that are not given are inputs of the function all the same.
        attributes: all of them, with defaults.
        rotary, interleaved: whether queries and keys are rotated, and whether by pairs side by side.
    """
    b = Body(list(attributes), variant)
    values = {each: ir.Value(name=each) for each in inputs}
    x = {each: values[each] for each in given}
    heads, kv_heads = b.attribute("num_heads"), b.attribute("kv_num_heads")
    head = b.dimension(x["past_key"], 3)
    rows = b.dimension(x["query"], 1)
    total = b.op("Reshape", b.op("Cast", x["total_sequence_length"], to=ir.DataType.INT64), b.ints(1))
    past = b.op("Sub", total, rows)

    q, k, v = _new(b, x, heads, kv_heads, head, rows)
    if rotary:
        cosine, sine = _tables(b, x, past, total)
        q, k = (_rotated(b, each, cosine, sine, interleaved) for each in (q, k))
    by_head = lambda value: b.op("Unsqueeze", b.op("Transpose", value, perm=[1, 0, 2]), b.ints(0))  # noqa: E731
    key, value = (_appended(b, x[f"past_{n}"], by_head(new), past, total) for n, new in (("key", k), ("value", v)))

    scale = b.float_attribute("scale")
    own = b.op("Div", b.constant(1, np.float32), b.op("Sqrt", b.to_float(b.op("Squeeze", head, b.ints(0)))))
    q = b.op("Mul", q, b.op("Where", b.op("Equal", scale, b.constant(0, np.float32)), own, scale))
    y = _attend(b, q, key, value, x.get("attention_bias"), past, total)
    for output, label in zip((y, key, value), ("output", "present_key", "present_value"), strict=True):
        output.name = label
    graph = ir.Graph(list(values.values()), [y, key, value], nodes=b.nodes, opset_imports={"": STANDARD_OPSET})
    kind = lambda default: ir.AttributeType.FLOAT if isinstance(default, float) else ir.AttributeType.INT  # noqa: E731
    declared = [ir.Attr(each, kind(default), None) for each, default in attributes.items()]
    declared.append(ir.Attr(marker(variant), ir.AttributeType.INT, None))
    return ir.Function(DOMAIN, name, variant, graph=graph, attributes=declared)


def _new(b: Body, x: Mapping[str, ir.Value], heads, kv_heads, head, rows) -> list[ir.Value]:
    """Query, key and value of the new rows, `[rows, heads, head]` each."""
    if "key" in x:
        parts = [x["query"], x["key"], x["value"]]
    else:
        ends = [b.op("Mul", n, head) for n in (heads, b.op("Add", heads, kv_heads))]
        cuts = [b.ints(0), *ends, b.ints(_LARGE)]
        parts = [b.op("Slice", x["query"], *cut, b.ints(2)) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
    return [b.reshape(part, rows, n, head) for part, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)]


def _tables(b: Body, x: Mapping[str, ir.Value], past: ir.Value, total: ir.Value) -> list[ir.Value]:
    """Cosines and sines of the new rows, `[rows, 1, rotary / 2]`."""
    if "position_ids" in x:
        at = b.op("Squeeze", x["position_ids"], b.ints(0))
    else:
        bounds = [b.op("Squeeze", each, b.ints(0)) for each in (past, total)]
        at = b.op("Range", *bounds, b.constant(1, np.int64))
    return [b.op("Unsqueeze", b.op("Gather", x[name], at), b.ints(1)) for name in ("cos_cache", "sin_cache")]


def _rotated(b: Body, x: ir.Value, cosine: ir.Value, sine: ir.Value, interleaved: bool) -> ir.Value:
    """`[rows, heads, head]`, its leading columns rotated; every product and sum rounded."""
    last, half = b.ints(2), b.dimension(cosine, 2)
    width = b.op("Add", half, half)
    if interleaved:
        first, second = (b.op("Slice", x, b.ints(i), width, last, b.ints(2)) for i in (0, 1))
    else:
        first, second = b.op("Slice", x, b.ints(0), half, last), b.op("Slice", x, half, width, last)
    turned = [
        b.op("Sub", b.op("Mul", first, cosine), b.op("Mul", second, sine)),
        b.op("Add", b.op("Mul", second, cosine), b.op("Mul", first, sine)),
    ]
    rest = b.op("Slice", x, width, b.ints(_LARGE), last)
    if interleaved:
        pairs = b.op("Concat", *(b.op("Unsqueeze", each, b.ints(3)) for each in turned), axis=3)
        turned = [b.reshape(pairs, b.op("Shape", x, start=0, end=2), width)]
    return b.op("Concat", *turned, rest, axis=2)


def _appended(b: Body, past_tensor: ir.Value, new: ir.Value, past: ir.Value, total: ir.Value) -> ir.Value:
    """The present: what is filled, the new rows, and what lies behind as it was. Past and present may be one buffer: the slices
    are copies, made before it is written."""
    axis = b.ints(2)
    filled = b.op("Slice", past_tensor, b.ints(0), past, axis)
    return b.op("Concat", filled, new, b.op("Slice", past_tensor, total, b.ints(_LARGE), axis), axis=2)


def _attend(
    b: Body, q: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value | None, past: ir.Value, total: ir.Value
) -> ir.Value:
    """`[1, rows, heads · head]` from q `[rows, heads, head]`, rotated and scaled, and the present.

    Inside, "lines" are the query heads of a kv head and the rows, and one that is there twice: `[kv heads, lines, ...]`.
    """
    rows, heads, head = (b.dimension(q, axis) for axis in range(3))
    kv_heads = b.dimension(key, 1)
    group = b.op("Div", heads, kv_heads)
    blocks = b.op("Div", b.op("Add", total, b.ints(BLOCK - 1)), b.ints(BLOCK))
    room = b.op("Mul", blocks, b.ints(BLOCK))
    grouped = b.op("Transpose", b.reshape(q, rows, kv_heads, group, head), perm=[1, 2, 0, 3])
    lines = _once_more(b, b.reshape(grouped, kv_heads, b.op("Mul", group, rows), head))

    at = b.op("Range", *(b.op("Squeeze", each, b.ints(0)) for each in (past, total)), b.constant(1, np.int64))
    per_line = _once_more(b, b.reshape(b.op("Expand", at, b.op("Concat", group, rows, axis=0)), b.ints(1), b.ints(-1), b.ints(1)))
    starts = b.op("Mul", _counted(b, blocks), b.constant(BLOCK, np.int64))
    position = b.op("Add", b.reshape(starts, blocks, b.ints(1)), b.constant(np.arange(BLOCK)[None], np.int64))

    scanned = [_blocks(b, each, total, room, blocks) for each in (key, value)]
    scanned.append(b.op("Cast", position, to=ir.DataType.DOUBLE))
    types = [ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.DOUBLE]
    if bias is not None:
        scanned.append(_bias_blocks(b, bias, kv_heads, group, rows, total, room, blocks))
        types.append(ir.DataType.FLOAT)
    side = lambda width: b.op("Concat", b.op("Shape", lines, start=0, end=2), width, axis=0)  # noqa: E731
    none = b.op("Expand", b.constant([-np.inf], np.float32), side(b.ints(1)))
    zeros = b.op("Expand", b.constant([0], np.float32), side(b.op("Add", head, b.ints(1))))
    lanes = _lanes(b, lines)
    seen_to = b.to_double(per_line)

    def step(s: Body, state: ir.Value, keys: ir.Value, values: ir.Value, where: ir.Value, *own: ir.Value) -> ir.Value:
        scores = _halves(s, s.op("MatMul", lanes, s.op("Transpose", _lanes(s, keys), perm=[0, 1, 3, 2])), 0)
        scores = s.op("Squeeze", scores, s.ints(0))
        if own:
            scores = s.op("Add", scores, own[0])
        scores = s.op("Where", _seen(s, where, seen_to), scores, s.constant(-np.inf, np.float32))
        greatest = s.op("ReduceMax", scores, s.ints(-1), keepdims=1)
        e = _exponential(s, s.op("Sub", scores, _finite(s, greatest)))
        found = s.op("Concat", greatest, _sum(s, e), s.op("MatMul", e, values), axis=2)
        return _joined(s, state, found)

    state = b.fold_with(ir.DataType.FLOAT, b.op("Concat", none, zeros, axis=2), scanned, types, step)
    columns = lambda begin, end: b.op("Slice", state, b.ints(begin), b.ints(end), b.ints(2))  # noqa: E731
    y = b.op("Div", columns(2, _LARGE), columns(1, 2))
    y = b.op("Slice", y, b.ints(0), b.op("Mul", group, rows), b.ints(1))
    y = b.op("Transpose", b.reshape(y, kv_heads, group, rows, head), perm=[2, 0, 1, 3])
    return b.reshape(y, b.ints(1), rows, b.op("Mul", heads, head))


def _counted(b: Body, count: ir.Value) -> ir.Value:
    return b.op("Range", b.constant(0, np.int64), b.op("Squeeze", count, b.ints(0)), b.constant(1, np.int64))


def _once_more(b: Body, lines: ir.Value) -> ir.Value:
    """The first of axis 1 a second time, at its end."""
    return b.op("Concat", lines, b.op("Slice", lines, b.ints(0), b.ints(1), b.ints(1)), axis=1)


def _padded(b: Body, x: ir.Value, amount: ir.Value, axis: int) -> ir.Value:
    """Zeros behind the end of an axis, counted from the back."""
    return b.op("Pad", x, b.op("Concat", b.ints(0), amount, axis=0), b.constant(0, np.float32), b.ints(axis))


def _blocks(b: Body, cache: ir.Value, total: ir.Value, room: ir.Value, blocks: ir.Value) -> ir.Value:
    """`[1, kv heads, capacity, head]` -> `[blocks, kv heads, 128, head]`: what is filled, zeros behind."""
    filled = b.op("Squeeze", b.op("Slice", cache, b.ints(0), total, b.ints(2)), b.ints(0))
    padded = _padded(b, filled, b.op("Sub", room, total), -2)
    shape = (b.dimension(cache, 1), blocks, b.ints(BLOCK), b.dimension(cache, 3))
    return b.op("Transpose", b.reshape(padded, *shape), perm=[1, 0, 2, 3])


def _bias_blocks(b: Body, bias: ir.Value, kv_heads, group, rows, total, room, blocks) -> ir.Value:
    """`[1, 1 or heads, rows, positions]` -> `[blocks, kv heads, lines, 128]`."""
    seen = b.op("Slice", bias, b.ints(0), total, b.ints(3))
    heads = b.op("Mul", kv_heads, group)
    each = b.op("Expand", seen, b.op("Concat", b.ints(1), heads, rows, total, axis=0))
    padded = _padded(b, b.reshape(each, kv_heads, b.op("Mul", group, rows), total), b.op("Sub", room, total), -1)
    lines = _once_more(b, padded)
    cut = b.reshape(lines, kv_heads, b.dimension(lines, 1), blocks, b.ints(BLOCK))
    return b.op("Transpose", cut, perm=[2, 0, 1, 3])


def _lanes(b: Body, x: ir.Value) -> ir.Value:
    """`[kv heads, n, head]` -> `[16, kv heads, n, head / 16]`: column i of the head in lane i mod 16, zeros behind the head."""
    head = b.dimension(x, 2)
    missing = b.op("Mod", b.op("Neg", head), b.ints(LANES))
    padded = _padded(b, x, missing, -1)
    across = b.op("Div", b.op("Add", head, missing), b.ints(LANES))
    cut = b.reshape(padded, b.op("Shape", x, start=0, end=2), across, b.ints(LANES))
    return b.op("Transpose", cut, perm=[3, 0, 1, 2])


def _halves(b: Body, x: ir.Value, axis: int) -> ir.Value:
    """The 16 of an axis summed: j to j + 8, then 4, 2, 1."""
    for width in (8, 4, 2, 1):
        cut = lambda begin, x=x, width=width: b.op("Slice", x, b.ints(begin), b.ints(begin + width), b.ints(axis))  # noqa: E731
        x = b.op("Add", cut(0), cut(width))
    return x


def _seen(b: Body, position: ir.Value, last: ir.Value) -> ir.Value:
    """Whether a line sees a position: up to its own, with a window the last so many."""
    window = b.to_double(b.attribute("local_window_size"))
    within = b.op("Greater", position, b.op("Sub", last, window))
    unlimited = b.op("LessOrEqual", window, b.constant(0, np.float64))
    return b.op("And", b.op("LessOrEqual", position, last), b.op("Or", unlimited, within))


def _finite(b: Body, greatest: ir.Value) -> ir.Value:
    """0 for −infinity: where nothing is seen."""
    nothing = b.op("Equal", greatest, b.constant(-np.inf, np.float32))
    return b.op("Where", nothing, b.constant(0, np.float32), greatest)


def _fma(b: Body, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return b.to_float(b.op("Add", b.op("Mul", b.to_double(x), b.to_double(y)), b.to_double(z)))


def _exponential(b: Body, x: ir.Value) -> ir.Value:
    """e^x for x ≤ 0; 0 below −87; NaN stays."""
    number = lambda value: b.constant(value, np.float32)  # noqa: E731
    in_range = b.op("GreaterOrEqual", x, number(_LOWEST))
    safe = b.op("Where", in_range, x, number(0))
    n = b.op("Sub", _fma(b, safe, number(_LOG2_E), number(_ROUND)), number(_ROUND))
    r = _fma(b, n, number(_LN2_REST), _fma(b, n, number(_LN2), safe))
    p = number(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = _fma(b, p, r, number(coefficient))
    powers = b.constant([2.0**-i for i in range(127)], np.float32)
    raised = b.op("Mul", p, b.op("Gather", powers, b.op("Cast", b.op("Neg", n), to=ir.DataType.INT64)))
    below = b.op("Where", b.op("IsNaN", x), x, number(0))
    return b.op("Where", in_range, raised, below)


def _sum(b: Body, e: ir.Value) -> ir.Value:
    """Of 128 exponentials: lane i takes the positions i, i + 16, ... in order, and the lanes are added by halves."""
    lanes = [b.op("Slice", e, b.ints(i), b.ints(i + LANES), b.ints(2)) for i in range(0, BLOCK, LANES)]
    total = lanes[0]
    for lane in lanes[1:]:
        total = b.op("Add", total, lane)
    return _halves(b, total, 2)


def _joined(b: Body, state: ir.Value, found: ir.Value) -> ir.Value:
    """What is known after a block: greatest score, sum and values, side by side."""
    parts = lambda x: [b.op("Slice", x, b.ints(i), b.ints(j), b.ints(2)) for i, j in ((0, 1), (1, _LARGE))]  # noqa: E731
    (most, known), (block_most, block) = parts(state), parts(found)
    greatest = b.op("Max", most, block_most)
    shift = _finite(b, greatest)
    mine, theirs = (_exponential(b, b.op("Sub", each, shift)) for each in (most, block_most))
    return b.op("Concat", greatest, _fma(b, known, mine, b.op("Mul", block, theirs)), axis=2)
