"""What the solver promises: lower layer losses, what is stored is what was solved, refusals with their reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcompiler.numerics import gptvq_layer as solver
from qcompiler.numerics import vq_tables
from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.numerics.gptvq import GptvqOptions, gptvq, vq_nearest
from qcompiler.numerics.hessian import layer_loss, second_moment
from qcompiler.numerics.vq import VqWeight
from qcompiler.numerics.vq_shape import VqGeneral, VqShape
from qcompiler.ops.formats import AffineFormat, VqFormat

F64 = torch.float64
FORMATS = [
    "vq2d16-b16x128-g128", "vq2d32-b16x256-g128", "vq2d64-b32x256-g64", "vq2d256-b128x256-g128", "vq4d256-b128x256-row",
    "vq1d4-b16x128-g128", "vq1d8-b16x256-g32", "vq1d16-b16x256-row", "vq2d16-ballxall-g128", "vq2d16-b16xall-row",
]  # fmt: skip
SHAPES = [
    VqShape(2, 16, 8, 256, scales="none", spread=False), VqShape(1, 8, 2, 128, 64, "log4"), VqShape(1, 8, 4, 0, codebooks="svd"),
    VqShape(2, 64, 0, 256, 64, codebooks="int4", spread=False), VqShape(3, 64, 4, 0, codebooks="fp16", spread=False),
]  # fmt: skip
FORMAT = VqFormat.parse("vq2d16-b16x128-g64")
NF4 = torch.tensor(vq_tables.NF4)[:, None]


def inputs(k=160, tokens=500, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -1.5, k)[:, None]
    return torch.randn(tokens, k, generator=generator) @ mix


def weight(n=32, k=160, seed=0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 1000))


@pytest.mark.parametrize("format", [*map(VqFormat.parse, FORMATS), *SHAPES], ids=lambda f: getattr(f, "label", None))
def test_every_format_has_much_less_loss_than_rounding(format):
    w, hessian = weight(), second_moment(inputs())
    result = gptvq(w, hessian, format)
    assert result.fallback is None and result.dead == 0 and result.attempts >= 1
    dequantized = result.weight.dequantize()
    assert result.loss_after == pytest.approx(layer_loss(w, dequantized, hessian), rel=2e-3)
    nearest = vq_nearest(w, format)
    assert result.loss_after < 0.75 * layer_loss(w, nearest.dequantize(), hessian)
    assert result.loss_after < 0.75 * result.loss_before
    if isinstance(format, VqShape):
        assert isinstance(result.weight, VqGeneral)
        return
    found = result.weight
    assert isinstance(found, VqWeight) and found.format == format and found.columns == 160
    down, across = format.blocks(32, 160)
    assert found.indices.dtype == torch.uint8 and found.indices.shape == (32, format.vectors(160))
    assert int(found.indices.max()) < format.centroids
    assert found.codebooks.dtype == torch.int8 and found.codebooks.shape == (down, across, format.centroids, format.dim)
    assert found.codebook_scales.dtype == torch.float16 and found.codebook_scales.shape == (down, across)
    assert found.scales.dtype == torch.float16 and found.scales.shape == (32, format.groups(160))


@pytest.mark.parametrize("label", FORMATS)
def test_what_is_stored_is_what_was_solved(label, monkeypatch):
    """Bit for bit: W̃ as decoded, and the difference that the last pass left."""
    kept = []
    natural = solver.Layer._natural

    def keep(self, solved, layout, count):
        kept.append((solved.blocks, layout, self.codec.unit))
        return natural(self, solved, layout, count)

    monkeypatch.setattr(solver.Layer, "_natural", keep)
    found = gptvq(weight(), second_moment(inputs()), VqFormat.parse(label)).weight.dequantize()
    (blocks, layout, unit) = kept[0]
    decoded = torch.cat([coded.block.decode() for coded in blocks])[:, :32] * unit
    real = layout.permutation < 160
    assert torch.equal(found[:, layout.permutation[real]].T, decoded[real])


def test_a_fixed_table_is_kept():
    w, hessian = weight(), second_moment(inputs())
    format = VqFormat.parse("vq1d16-ballxall-g64")
    result = gptvq(w, hessian, format, table=NF4)
    codes, step = vq_tables.entries(NF4)
    assert torch.equal(result.weight.codebooks, codes[None, None]) and torch.equal(result.weight.codebook_scales, step.view(1, 1))
    assert result.loss_after < 0.6 * layer_loss(w, vq_nearest(w, format, NF4).dequantize(), hessian)
    absmax = w[:, :128].view(32, 2, 64).abs().amax(2, keepdim=True)
    plain = (w[:, :128].view(32, 2, 64) / absmax)[..., None].sub(NF4[:, 0]).abs().argmin(-1)
    simple = (NF4[:, 0][plain] * absmax).view(32, 128)
    nearest = vq_nearest(w[:, :128], format, NF4).dequantize()
    assert (nearest - w[:, :128]).square().sum() < (simple - w[:, :128]).square().sum()
    down, across = VqFormat(1, 16, 16, 128, 32).blocks(32, 160)
    blocks = gptvq(w, hessian, VqFormat(1, 16, 16, 128, 32), table=NF4).weight
    assert blocks.codebooks.shape == (down, across, 16, 1) and (blocks.codebooks == codes).all()


def test_rows_and_columns_that_do_not_fill_blocks():
    for n, k, label in ((20, 100, "vq2d16-b16x128-g64"), (9, 130, "vq4d256-b128x256-row"), (33, 70, "vq1d8-b16x128-g32")):
        w, hessian = weight(n, k), second_moment(inputs(k))
        result = gptvq(w, hessian, VqFormat.parse(label))
        dequantized = result.weight.dequantize()
        assert dequantized.shape == (n, k) and result.fallback is None
        assert result.loss_after == pytest.approx(layer_loss(w, dequantized, hessian), rel=2e-3)
        assert result.loss_after < 0.8 * layer_loss(w, vq_nearest(w, VqFormat.parse(label)).dequantize(), hessian)


def test_more_dimensions_lose_less_at_equal_bits():
    """2.25 bits a weight each: pairs, single columns, GPTQ; on average over correlated layers."""
    pairs, single = VqShape(2, 16, 16, 64, 0, "none"), VqShape(1, 4, 2, 64, 0, "none")
    totals = torch.zeros(3)
    for seed in range(20):
        w, hessian = weight(32, 128, seed), second_moment(inputs(128, seed=seed))
        base = layer_loss(w, torch.zeros_like(w), hessian)
        losses = [gptvq(w, hessian, shape).loss_after for shape in (pairs, single)]
        losses.append(gptq(w, hessian, AffineFormat(2, 64), GptqOptions(compare=False)).loss_after)
        totals += torch.tensor(losses) / base
    assert pairs.bits(32, 128) <= 2.25 + 1 / 64 and single.bits(32, 128) <= 2.5
    assert totals[0] < totals[1] < totals[2]


def test_passes_without_rounds_move_indices_alone():
    w, hessian = weight(), second_moment(inputs())
    plain, passed = (gptvq(w, hessian, FORMAT, GptvqOptions(rounds=0, passes=passes)) for passes in (0, 1))
    assert passed.loss_after < plain.loss_after
    assert (passed.weight.indices != plain.weight.indices).any()
    for name in ("codebooks", "codebook_scales", "scales"):
        torch.testing.assert_close(getattr(passed.weight, name), getattr(plain.weight, name), rtol=0, atol=0)


def test_more_rounds_and_passes_lose_less():
    w, hessian = weight(), second_moment(inputs())
    losses = [
        gptvq(w, hessian, FORMAT, GptvqOptions(rounds=rounds, passes=passes)).loss_after
        for rounds, passes in ((0, 0), (1, 0), (1, 1), (2, 2))
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_scales_are_solved_for():
    """A row that is a thousand times another shares its codebook, and loses no more of itself."""
    w, hessian = weight(), second_moment(inputs())
    uneven = w * torch.logspace(-1.5, 1.5, 32)[:, None]
    for label in ("vq2d16-b16x128-g64", "vq2d16-b16x128-row"):
        solved = gptvq(uneven, hessian, VqFormat.parse(label)).weight.dequantize()
        plain = gptvq(w, hessian, VqFormat.parse(label)).loss_after / layer_loss(w, torch.zeros_like(w), hessian)
        for row in range(0, 32, 5):
            own = slice(row, row + 1)
            lost = layer_loss(uneven[own], solved[own], hessian) / layer_loss(uneven[own], torch.zeros(1, 160), hessian)
            assert lost < 3 * plain


# ---- who knows of whom


def test_rows_that_share_no_codebook_know_nothing_of_each_other(monkeypatch):
    w, hessian = weight(48), second_moment(inputs())
    options = GptvqOptions(dtype=F64)
    whole = gptvq(w, hessian, FORMAT, options).weight
    monkeypatch.setattr(solver, "ROWS", 16)
    monkeypatch.setattr(solver, "LEAST_ROWS", 16)
    pieces = gptvq(w, hessian, FORMAT, options)
    assert torch.equal(whole.indices, pieces.weight.indices) and torch.equal(whole.codebooks, pieces.weight.codebooks)
    assert pieces.loss_after == pytest.approx(layer_loss(w, whole.dequantize(), hessian), rel=1e-6)
    half = gptvq(w[16:32], hessian, FORMAT, options).weight
    error = (half.dequantize() - whole.dequantize()[16:32]).abs().max()
    assert error < 0.05 * w.abs().max()  # the unit of all rows may differ by a power of two: scales round alike


def test_equal_hessians_for_all_rows_are_one():
    w, hessian = weight(64), second_moment(inputs())
    options = GptvqOptions(dtype=F64)
    plain = gptvq(w, hessian, FORMAT, options)
    guided = gptvq(w, None, FORMAT, options, row_hessians=hessian.expand(4, -1, -1))
    assert torch.equal(plain.weight.indices, guided.weight.indices)
    assert torch.equal(plain.weight.codebooks, guided.weight.codebooks) and torch.equal(plain.weight.scales, guided.weight.scales)
    assert guided.loss_after == pytest.approx(plain.loss_after, rel=1e-9)


def test_each_part_of_the_rows_is_solved_with_its_own_hessian():
    w = weight(64)
    hessians = torch.stack([second_moment(inputs(seed=seed)) for seed in (0, 1)])
    guided = gptvq(w, hessians[0], FORMAT, row_hessians=hessians)
    plain = gptvq(w, hessians[0], FORMAT)
    second = slice(32, 64)
    lost = lambda found: layer_loss(w[second], found.weight.dequantize(second), hessians[1])  # noqa: E731
    assert lost(guided) < 0.8 * lost(plain)
    first = layer_loss(w[:32], guided.weight.dequantize(slice(32)), hessians[0])
    assert guided.loss_after == pytest.approx(first + lost(guided), rel=1e-3)
    table = gptvq(w, None, VqFormat.parse("vq1d16-ballxall-g64"), row_hessians=hessians, table=NF4)
    assert table.weight.codebooks.shape == (1, 1, 16, 1) and table.loss_after < 0.6 * table.loss_before


def test_blocks_of_columns_may_be_anywhere():
    """The order of the sweep is none of the format: blocks that change places take their codebooks and indices along."""
    w, hessian = weight(k=256), second_moment(inputs(256))
    shuffled = torch.cat([torch.arange(128, 256), torch.arange(128)])
    options = GptvqOptions(dtype=F64)
    one = gptvq(w, hessian, FORMAT, options).weight
    other = gptvq(w[:, shuffled], hessian[shuffled][:, shuffled], FORMAT, options).weight
    assert torch.equal(one.codebooks.flip(1), other.codebooks) and torch.equal(one.dequantize()[:, shuffled], other.dequantize())
    natural = gptvq(w, hessian, FORMAT, replace(options, ordering="none"))
    assert natural.loss_after == pytest.approx(layer_loss(w, natural.weight.dequantize(), hessian), rel=1e-6)
    assert not torch.equal(natural.weight.indices, one.indices)


def test_rows_of_a_codebook_in_another_order_have_the_same_codebook():
    w, hessian = weight(16), second_moment(inputs())
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    options = GptvqOptions(dtype=F64, seeding="mahalanobis")
    one, other = gptvq(w, hessian, FORMAT, options).weight, gptvq(w[shuffled], hessian, FORMAT, options).weight
    assert torch.equal(one.indices[shuffled], other.indices) and torch.equal(one.codebooks, other.codebooks)


def test_the_same_twice_and_another_with_another_seed():
    w, hessian = weight(), second_moment(inputs())
    first, again, other = (gptvq(w, hessian, FORMAT, seed=seed).weight for seed in (1, 1, 2))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.scales, again.scales)
    assert not torch.equal(first.indices, other.indices)


# ---- asymmetric calibration


def test_cross_statistics_lower_the_error_against_the_float_layer():
    total = {"plain": 0.0, "asymmetric": 0.0}
    for seed in range(3):
        clean, w = inputs(96, 2000, seed).double(), weight(k=96, seed=seed)
        noise = torch.randn(96, 96, generator=torch.Generator().manual_seed(seed), dtype=F64) / 96**0.5
        x = clean + 0.15 * clean @ noise
        hessian, cross = second_moment(x), second_moment(x, clean)
        error = lambda found, x=x, clean=clean, w=w: (  # noqa: E731
            (x @ found.dequantize().double().T - clean @ w.double().T).square().sum(1).mean().item()
        )
        plain, mixed = gptvq(w, hessian, FORMAT), gptvq(w, hessian, FORMAT, cross=cross)
        total["plain"] += error(plain.weight)
        total["asymmetric"] += error(mixed.weight)
        constant = ((x - clean) @ w.double().T).square().sum(1).mean().item()
        assert mixed.loss_after + constant == pytest.approx(error(mixed.weight), rel=1e-3)
        assert mixed.fallback is None and mixed.loss_after < mixed.loss_before
    assert total["asymmetric"] < 0.95 * total["plain"]


def test_without_a_difference_cross_statistics_change_nothing():
    w, hessian = weight(), second_moment(inputs())
    options = GptvqOptions(dtype=F64)
    plain, mixed = gptvq(w, hessian, FORMAT, options), gptvq(w, hessian, FORMAT, options, cross=torch.zeros(160, 160))
    assert torch.equal(plain.weight.indices, mixed.weight.indices)
    assert mixed.loss_after == pytest.approx(plain.loss_after, rel=1e-6)


# ---- hard channels


@pytest.mark.parametrize("kind", ["dead", "duplicate", "constant", "huge", "tiny", "few"])
def test_hard_channels(kind):
    x, w = inputs(), weight()
    if kind == "dead":
        x[:, [0, 4, 159]] = 0
    elif kind == "duplicate":
        x[:, 1:60] = x[:, :1]
    elif kind == "constant":
        x[:, 7] = 3
    elif kind == "few":
        x = x[:1]  # one calibration sample
    else:
        x[:, [7, 90]] *= 1e4 if kind == "huge" else 1e-12
    hessian = second_moment(x)
    result = gptvq(w, hessian, FORMAT)
    assert result.fallback is None and result.dead == (3 if kind == "dead" else 0)
    assert torch.isfinite(result.weight.scales).all() and torch.isfinite(result.weight.codebook_scales).all()
    assert result.loss_after < result.loss_before
    if kind == "dead":  # 0 and 4 are a vector: rounded, not zeroed
        own = result.weight.dequantize()[:, [0, 4]]
        assert (w[:, [0, 4]] - own).square().mean() < 0.5 * w[:, [0, 4]].square().mean()


def test_zero_and_constant_weights():
    hessian = second_moment(inputs())
    w = weight()
    w[3] = 0
    w[5, 64:128] = 0
    w[16:] = 0.5
    result = gptvq(w, hessian, FORMAT)
    dequantized = result.weight.dequantize()
    assert result.fallback is None and torch.isfinite(dequantized).all()
    assert (dequantized[3] == 0).all() and (dequantized[16:] - 0.5).abs().max() < 0.02
    nothing = gptvq(torch.zeros(32, 160), hessian, FORMAT)
    assert (nothing.weight.dequantize() == 0).all() and nothing.loss_after == 0


def test_without_any_input_it_rounds_and_says_so():
    w = weight()
    result = gptvq(w, torch.zeros(160, 160), FORMAT)
    assert "no calibration input reached the layer" in result.fallback and result.dead == 160
    assert torch.equal(result.weight.dequantize(), vq_nearest(w, FORMAT).dequantize())


def test_where_the_sweep_would_lose_it_rounds_and_says_so(monkeypatch):
    """A sweep that returns noise."""
    w, hessian = weight(), second_moment(inputs())
    monkeypatch.setattr(solver.Layer, "_damped_loss", lambda *_: torch.tensor(next(losses), dtype=F64))
    losses = iter([1e9, 1.0])
    result = gptvq(w, hessian, FORMAT)
    assert "above that of the weight's own codebooks" in result.fallback and result.loss_after < 1e9
    assert torch.equal(result.weight.dequantize(), vq_nearest(w, FORMAT).dequantize())


# ---- refusals


def test_refusals():
    w, hessian = weight(), second_moment(inputs())
    bad = w.clone()
    bad[3, 4] = float("nan")
    table = torch.zeros(8, 2)
    for arguments, options, reason in (
        ((bad, hessian, FORMAT), {}, "NaN or infinite entries"),
        ((w, hessian[:80, :80], FORMAT), {}, "Hessian is float64 \\[80, 80\\], expected"),
        ((w, hessian * float("inf"), FORMAT), {}, "Hessian has NaN"),
        ((w, hessian, FORMAT), {"cross": torch.zeros(3, 3)}, "cross statistic is"),
        ((w, hessian, FORMAT), {"table": table}, "table is \\[8, 2\\], expected \\[16, 2\\]"),
        ((w, None, FORMAT), {}, "needs a Hessian"),
        ((w, None, FORMAT), {"row_hessians": hessian.expand(3, -1, -1)}, "32 rows have no 3 equal parts"),
        ((w, None, FORMAT), {"row_hessians": hessian.expand(4, -1, -1)}, "codebook's rows, 16, would cross the 4 parts of 8"),
        ((w[:4, :16], hessian[:16, :16], VqFormat.parse("vq2d256-b128x256-g128")), {}, "256 centroids for a block of 4 x 16"),
        ((w * 1e12, hessian, FORMAT), {}, "float16"),
    ):
        with pytest.raises(ValueError, match=reason):
            gptvq(*arguments, **options)
    with pytest.raises(ValueError, match="'official' knows neither cross statistics nor fixed tables"):
        gptvq(w, hessian, FORMAT, GptvqOptions(mode="official"), cross=hessian)
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        vq_nearest(bad, FORMAT)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "fast"}, "mode is 'fast', expected one of 'exact', 'official'"), ({"seeding": "x"}, "seeding is 'x'"),
        ({"iterations": 0}, "iterations is 0, expected at least 1"), ({"rounds": -1}, "rounds is -1, expected at least 0"),
        ({"damping": 2.0}, "damping is 2"), ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(change, reason):
    with pytest.raises(ValueError, match=reason):
        GptvqOptions(**change)
