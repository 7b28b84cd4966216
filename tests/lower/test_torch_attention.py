"""Attention of a torch program by our op: what it computes, which nodes, why others stay; angles in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.lower.torch_attention import use_own_attention, widen_angles
from qcompiler.ops.attention import ATTENTION, hides_later

sdpa = torch.nn.functional.scaled_dot_product_attention


def drawn(rows: int, past: int, heads: int = 4, kv_heads: int = 2, head: int = 24):
    generator = torch.Generator().manual_seed(rows + past)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    q = normal(1, heads, rows, head)
    return q, *(normal(1, kv_heads, n, head) for n in (past, rows) for _ in range(2))


def causal(rows: int, past: int, window: int = 10**6) -> torch.Tensor:
    own, at = torch.arange(past, past + rows)[:, None], torch.arange(past + rows)[None]
    return ((at <= own) & (at > own - window))[None, None]


@pytest.mark.parametrize("rows, past", [(1, 0), (1, 40), (5, 0), (7, 300)])
@pytest.mark.parametrize("as_bias", [False, True])
def test_the_op_is_attention(rows: int, past: int, as_bias: bool) -> None:
    q, past_key, past_value, new_key, new_value = drawn(rows, past)
    k, v, mask = torch.cat([past_key, new_key], 2), torch.cat([past_value, new_value], 2), causal(rows, past, 60)
    before = k.clone(), v.clone()
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if as_bias else mask
    found = ATTENTION(q, k, v, given, 0.3)
    expected = sdpa(*(x.double() for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True)
    assert (found - expected).abs().max() <= 1e-6
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    torch.library.opcheck(ATTENTION, (q, k, v, given, 0.3), test_utils=("test_schema", "test_faketensor"))


def test_a_buffer_with_room_behind_the_text_gives_the_same_bits() -> None:
    """Positions behind the last row's own are hidden by the mask: what a cache of fixed size holds there does not count."""
    q, past_key, past_value, new_key, new_value = drawn(2, 130)
    k, v = torch.cat([past_key, new_key], 2), torch.cat([past_value, new_value], 2)
    room = torch.full((1, 2, 150, 24), 7.0)
    more = torch.nn.functional.pad(causal(2, 130), (0, 150))
    found = ATTENTION(q, torch.cat([k, room], 2), torch.cat([v, room], 2), more, 0.3)
    assert torch.equal(found, ATTENTION(q, k, v, causal(2, 130), 0.3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(1, 3, 2, 24)}, "3 heads, expected a multiple of the 2"),
        ({"q": torch.zeros(1, 4, 2, 23)}, "expected .* of one sequence"),
        ({"q": torch.zeros(2, 4, 2, 24)}, "expected .* of one sequence"),
        ({"q": torch.zeros(1, 4, 2, 24, dtype=torch.float16)}, "expected float32 on the CPU"),
        ({"mask": causal(2, 5)[..., :-1]}, r"mask is \[1, 1, 2, 6\], expected 2 rows of 7 positions"),
        ({"mask": causal(2, 5)[0]}, r"mask is \[1, 2, 7\], expected \[1, 1 or 4, rows, positions\]"),
        ({"mask": torch.ones(1, 1, 2, 7, dtype=torch.bool)}, "a row sees a position after its own"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    q, past_key, past_value, new_key, new_value = drawn(2, 5)
    given = {"q": q, "k": torch.cat([past_key, new_key], 2), "v": torch.cat([past_value, new_value], 2), "mask": causal(2, 5)}
    with pytest.raises(RuntimeError, match=message):
        ATTENTION(*(given | change).values(), 0.3)


def test_masks_that_hide_what_comes_later() -> None:
    assert hides_later(causal(3, 4)) and hides_later(causal(3, 4, 2))
    assert hides_later(torch.zeros(3, 7).masked_fill(~causal(3, 4)[0, 0], torch.finfo(torch.float32).min))
    assert not hides_later(torch.ones(1, 1, 2, 2, dtype=torch.bool)) and not hides_later(torch.zeros(1, 1, 2, 2))
    assert hides_later(torch.ones(1, 1, 1, 9, dtype=torch.bool))


class Step(torch.nn.Module):
    """Attention over past and new positions; subclasses change a part."""

    def mask(self, rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        own, at = total - rows + torch.arange(rows)[:, None], torch.arange(total)[None]
        return (at <= own)[None, None]

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, total, head = x.shape
        return x[:, :, None].expand(batch, heads, 2, total, head).reshape(batch, 2 * heads, total, head)

    def forward(self, q, past_key, past_value, new_key, new_value):
        k, v = torch.cat([past_key, new_key], -2), torch.cat([past_value, new_value], -2)
        y = sdpa(q, self.repeat(k), self.repeat(v), attn_mask=self.mask(q.shape[2], k.shape[2]), scale=0.3)
        return y.transpose(1, 2).reshape(1, -1, 96), k, v


class Everywhere(Step):
    def mask(self, rows, total):
        return torch.ones(1, 1, rows, total, dtype=torch.bool)


class OtherHeads(Step):
    """Copies the heads in turn rather than side by side."""

    def repeat(self, x):
        return torch.cat([x, x], 1)


class Scaled(Step):
    def repeat(self, x):
        return super().repeat(x * 2)


class Unmasked(Step):
    def mask(self, rows, total):
        return None


def exported(module: torch.nn.Module):
    given, dim = drawn(3, 5), torch.export.Dim.AUTO
    program = torch.export.export(module, given, dynamic_shapes=tuple({2: dim} for _ in given), strict=False)
    found = program.module(check_guards=False)
    found.graph.set_codegen(torch.fx.graph.CodeGen())
    return torch.fx.GraphModule(found, found.graph), given


def targets(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes}


def test_the_node_is_replaced_and_heads_are_read_uncopied() -> None:
    module, given = exported(Step())
    result = use_own_attention(module, given)
    module.recompile()
    assert result.matched == {"mask": 1} and result.skipped == []
    (own,) = (node for node in module.graph.nodes if node.target is ATTENTION)
    assert [str(node.target) for node in own.args[1:3]] == ["aten.cat.default"] * 2
    assert "aten.scaled_dot_product_attention.default" not in targets(module)
    for other in (given, drawn(1, 200), drawn(4, 0)):
        for found, wanted in zip(module(*other), Step()(*other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Everywhere, "by the mask a row sees positions after its own"),
        (OtherHeads, "keys and values are not past ones and new ones side by side"),
        (Scaled, "keys and values are not past ones and new ones side by side"),
        (Unmasked, "no mask says what a row sees"),
    ],
)
def test_what_our_op_does_not_compute_stays(kind: type[Step], reason: str) -> None:
    module, given = exported(kind())
    result = use_own_attention(module, given)
    assert result.matched == {} and [each["reason"] for each in result.skipped] == [reason]
    assert "aten.scaled_dot_product_attention.default" in targets(module)


def test_a_recipe_may_leave_it() -> None:
    module, given = exported(Step())
    result = use_own_attention(module, given, wanted=False)
    assert [each["reason"] for each in result.skipped] == ["the recipe says own_attention: false"]


def test_angles_are_rounded_once() -> None:
    class Angles(torch.nn.Module):
        def forward(self, x, y):
            return x.cos(), x.sin() * 2, y.cos()

    x = torch.arange(4000, dtype=torch.float32)[None] * 0.37
    module = torch.export.export(Angles(), (x, x.double()), strict=False).module(check_guards=False)
    assert widen_angles(module.graph) == 2  # not of the double
    module.recompile()
    cosine, sine, double = module(x, x.double())
    np.testing.assert_array_equal(cosine.numpy(), np.cos(x.numpy().astype(np.float64)).astype(np.float32))
    np.testing.assert_array_equal(sine.numpy(), 2 * np.sin(x.numpy().astype(np.float64)).astype(np.float32))
    assert torch.equal(double, x.double().cos())
