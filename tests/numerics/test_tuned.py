"""Tuned matrices: untouched they are the solution, and their gradients are those of the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qcompiler.numerics import affine
from qcompiler.numerics.affine import AffineWeight
from qcompiler.numerics.straight_through import round_through
from qcompiler.numerics.tuned import Fixed, TunedAffine, TunedLinear, TunedLookup, TunedVq, group_sums
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import Activation, AffineFormat, VqFormat

# Blocks and groups that end short, whole-matrix codebooks, and every number of dimensions.
FORMATS = [
    ("vq2d16-b16x128-g128", 40, 200),
    ("vq2d32-b16x256-g32", 24, 300),
    ("vq4d256-ballxall-row", 20, 136),
    ("vq1d16-ballxall-g64", 17, 100),
]


def _vq(label: str, n: int, k: int) -> VqWeight:
    generator = torch.Generator().manual_seed(n)
    f = VqFormat.parse(label)
    down, across = f.blocks(n, k)
    return VqWeight(
        torch.randint(0, f.centroids, (n, f.vectors(k)), generator=generator).to(torch.uint8),
        torch.randint(-128, 128, (down, across, f.centroids, f.dim), generator=generator).to(torch.int8),
        (torch.rand(down, across, generator=generator) / 100 + 0.001).half(),
        (torch.rand(n, f.groups(k), generator=generator) + 0.5).half(),
        k,
        f,
    )


def _written_out(weight: VqWeight, theta: torch.Tensor, phi: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """S exp θ · c exp φ · round(C)[index], element by element."""
    f, n, k = weight.format, len(weight.indices), weight.columns
    scales, shared = weight.scales.float() * theta.exp(), weight.codebook_scales.float() * phi.exp()
    column = torch.arange(k)
    block, inside = column // f.span, column % f.span
    vector, j = 4 * block + inside % 4, inside // 4
    down = torch.arange(n) // (f.block_rows or n)
    across = column // (f.block_columns or k)
    level = round_through(entries)[down[:, None], across[None], weight.indices[:, vector].long(), j[None]]
    return scales[:, column // (f.group or k)] * shared[down][:, across] * level


@pytest.mark.parametrize("label,n,k", FORMATS)
def test_gradients_of_codebooks_and_scales(label: str, n: int, k: int):
    weight = _vq(label, n, k)
    tuned = TunedVq(weight)
    assert torch.equal(tuned.weight(), weight.dequantize())
    theta, phi, entries = (p.detach().clone().requires_grad_() for p in tuned.parameters.values())
    written = _written_out(weight, theta, phi, entries)
    assert torch.allclose(written, weight.dequantize(), rtol=1e-6)
    gradient = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    written.backward(gradient)
    found = tuned.gradients(gradient.clone())
    for own, expected in zip(found, (theta.grad, phi.grad, entries.grad), strict=True):
        assert own.shape == expected.shape and expected.any()
        assert (own - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("bits,group,symmetric", [(2, 32, False), (3, 128, True), (8, 0, True)])
def test_gradients_of_affine_scales(bits: int, group: int, symmetric: bool):
    generator = torch.Generator().manual_seed(bits)
    solution = affine.fit(torch.randn(24, 200, generator=generator), AffineFormat(bits, group, symmetric))
    tuned = TunedAffine(solution)
    assert torch.equal(tuned.weight(), solution.dequantize())
    theta = torch.zeros(solution.scales.shape, requires_grad=True)
    scale = (solution.scales.float() * theta.exp()).repeat_interleave(group or 200, dim=1)[:, :200]
    plain = AffineWeight(solution.codes, torch.ones_like(solution.scales), solution.zeros, solution.format).dequantize()
    gradient = torch.randn(24, 200, generator=generator)
    (plain * scale).backward(gradient)
    (found,) = tuned.gradients(gradient.clone())
    assert (found - theta.grad).norm() <= 1e-5 * theta.grad.norm()


@pytest.mark.parametrize("bits,group,symmetric", [(4, 32, True), (2, 64, False), (8, 0, True)])
def test_latent_codes_begin_at_the_solution_and_pass_gradients_through_rounding(bits: int, group: int, symmetric: bool):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 200, generator=generator)
    solution = affine.fit(weight, AffineFormat(bits, group, symmetric))
    moved = AffineWeight(solution.codes.clone(), solution.scales, solution.zeros, solution.format)
    moved.codes[:, ::7] = solution.codes[:, 3].unsqueeze(1)  # as a solver that does not round to the nearest
    tuned = TunedAffine(moved, weight)
    assert torch.equal(tuned.solution().codes, moved.codes) and torch.equal(tuned.weight(), moved.dequantize())
    scale = solution.scales.float().repeat_interleave(group or 200, dim=1)[:, :200]
    gradient = torch.randn(24, 200, generator=generator)
    to_scales, to_codes = tuned.gradients(gradient.clone())
    latent = tuned.parameters["codes"]
    assert torch.allclose(to_codes, gradient * scale, rtol=1e-6)
    assert torch.allclose(to_scales, group_sums(gradient * moved.dequantize(), group), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        latent[0, 0], latent[0, 1] = 1e4, -1e4
        latent[1, 0] += 1 if latent[1, 0] < 1 else -1
    low, high = solution.format.code_range
    low = -127 if bits == 8 else low
    assert tuned.solution().codes[0, :2].tolist() == [high, low]
    assert abs(int(tuned.solution().codes[1, 0]) - int(moved.codes[1, 0])) == 1
    assert not tuned.gradients(torch.ones(24, 200))[1][0, :2].any()


def test_what_is_stored_is_what_was_computed():
    tuned = TunedVq(_vq(*FORMATS[0]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    stored = tuned.solution()
    assert torch.equal(stored.dequantize(), tuned.weight())
    assert stored.codebooks.dtype == torch.int8 and stored.scales.dtype == stored.codebook_scales.dtype == torch.float16
    held = _vq(*FORMATS[0])
    assert torch.equal(stored.indices, held.indices) and stored.format == held.format
    assert (stored.codebooks != held.codebooks).any() and (stored.scales != held.scales).any()


def test_entries_do_not_leave_the_range_of_int8():
    weight = _vq(*FORMATS[0])
    tuned = TunedVq(weight)
    entries = tuned.parameters["codebooks"]
    with torch.no_grad():
        entries[0, 0, 0] = 300.0
        entries[0, 0, 1] = -300.0
    assert tuned.solution().codebooks[0, 0, 0].tolist() == [127, 127]
    assert tuned.solution().codebooks[0, 0, 1].tolist() == [-128, -128]
    gradient = tuned.gradients(torch.ones(40, 200))[2]
    assert not gradient[0, 0, :2].any() and gradient[0, 0, 2:].any()


def test_a_fixed_table_has_scales_alone():
    weight = _vq(*FORMATS[3])
    tuned = TunedVq(weight, fixed=True)
    assert list(tuned.parameters) == ["scales"] and len(tuned.gradients(torch.ones(17, 100))) == 1
    assert tuned.solution().codebooks is weight.codebooks


@pytest.mark.parametrize("keep", [True, False])
def test_products_pass_gradients_to_inputs_and_parameters(keep: bool):
    solution = affine.fit(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), AffineFormat(3, 32, True))
    tuned = TunedAffine(solution)
    product = TunedLinear(tuned, Activation.FLOAT, keep=keep)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias = torch.ones(12)
    y = product(x, None, bias)
    dense = solution.dequantize().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected = functional.linear(twin, dense, bias)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-6)
    assert torch.allclose(tuned.parameters["scales"].grad, group_sums(dense.grad * dense.detach(), 32), rtol=1e-5)
    with torch.no_grad():
        tuned.parameters["scales"] += 1
    product.forget()
    later = product(x, None, bias)
    assert torch.equal(later, functional.linear(x, tuned.solution().dequantize(), bias)) and not torch.equal(later, y)
    passing = TunedLinear(Fixed(solution), Activation.FLOAT, keep=keep)
    (to_x,) = torch.autograd.grad(passing(x, None, bias).square().sum(), x)
    assert torch.allclose(to_x, twin.grad, rtol=1e-6)


def test_a_lookup_and_a_product_of_one_matrix_add_their_gradients():
    solution = affine.fit(torch.randn(24, 96, generator=torch.Generator().manual_seed(0)), AffineFormat(4, 32))
    tuned = TunedAffine(solution)
    linear = TunedLinear(tuned, Activation.FLOAT)
    ids, x, u, v = torch.tensor([[3, 0], [3, 23]]), torch.randn(5, 96), torch.randn(5, 24), torch.randn(2, 2, 96)
    rows = TunedLookup(linear)(None, ids)
    assert torch.equal(rows, solution.dequantize()[ids])
    ((rows * v).sum() + (linear(x) * u).sum()).backward()
    dense = solution.dequantize().requires_grad_()
    ((dense[ids] * v).sum() + (functional.linear(x, dense) * u).sum()).backward()
    (expected,) = TunedAffine(solution).gradients(dense.grad.clone())
    (found,) = (p.grad for p in tuned.parameters.values())
    assert (found - expected).norm() <= 1e-5 * expected.norm()
