"""The matcher's short cut: the same rewrites, without a walk over the graph for each node, and gone afterwards."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxscript.rewriter import pattern
from onnxscript.rewriter._matcher import SimplePatternMatcher

from qcompiler.lower.quick_match import quick_match

LAYERS = 40


def model() -> ir.Model:
    lines = ["h0 = Identity(x)"]
    for i in range(LAYERS):
        lines += [f"s{i} = Add(h{i}, one)", f"n{i} = Neg(h{i})", f"d{i} = Sub(h{i}, one)"]
        lines += [f"m{i} = Mul(s{i}, d{i})", f"h{i + 1} = Add(m{i}, n{i})"]
    body = "\n".join(lines)
    return ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[4] x) => (float[4] h{LAYERS}) <float one = {{1}}> {{ {body} }}""")


def rule() -> pattern.RewriteRule:
    """Two outputs of one input: `a + c`, `a − c`."""
    return pattern.RewriteRule(
        lambda op, a, c: (op.Add(a, c), op.Sub(a, c)),
        lambda op, a, c: op.SumAndDifference(a, c, _domain="test", _outputs=2),
    )


def rewritten() -> tuple[int, str]:
    changed = model()
    return rule().apply_to_model(changed), str(changed.graph)


def test_the_same_rewrites_are_made() -> None:
    expected = rewritten()
    with quick_match():
        assert rewritten() == expected
    assert expected[0] == LAYERS


def test_the_graph_is_listed_for_fitting_nodes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = 0
    original = ir.Graph.__iter__

    def counted(graph: ir.Graph):
        nonlocal walks
        walks += 1
        return original(graph)

    monkeypatch.setattr(ir.Graph, "__iter__", counted)
    rewritten()
    slow, walks = walks, 0
    with quick_match():
        rewritten()
    # two nodes of five are additions
    assert walks < 0.6 * slow


def test_the_matcher_is_as_before_afterwards() -> None:
    before = SimplePatternMatcher.match
    with pytest.raises(KeyError), quick_match():
        assert SimplePatternMatcher.match is not before
        raise KeyError
    assert SimplePatternMatcher.match is before
