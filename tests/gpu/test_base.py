"""What all GPU kernels stand on: quantized activations, edges, the dispatch table, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.gpu import activations, device, dispatch, edges
from qcompiler.ops import linear_edges
from qcompiler.ops.activation_range import quantize_static
from qcompiler.ops.formats import Activation
from qcompiler.ops.linear_edges import Gate
from qcompiler.ops.linear_nbit import quantize_activations
from tests.gpu.parity import DEVICE

ROOT = Path(__file__).resolve().parents[2]
EPSILON = float(np.float32(1e-5))


def drawn(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(k)
    return rng.standard_normal((rows, k)).astype(np.float32), rng.uniform(0.5, 1.5, k).astype(np.float32)


def on(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array).to(DEVICE)


@pytest.mark.parametrize("k", [33, 300])
@pytest.mark.parametrize("normed", [False, True])
def test_int8_activations_have_the_bits_of_the_reference(k: int, normed: bool) -> None:
    x, norm = drawn(3, k)
    x[1] = 0  # absmax 0
    norm = norm if normed else None
    seen = x if norm is None else linear_edges.normalize(x, norm, EPSILON)
    for kind in (Activation.INT8_TOKEN, Activation.INT8_BLOCK):
        levels, scales = quantize_activations(seen, kind)
        a, scale = activations.quantize(on(x), kind, norm=on(norm), epsilon=EPSILON, multiple=16)
        assert a.shape == (3, -(-k // 16) * 16) and not a[:, k:].any()
        np.testing.assert_array_equal(a[:, :k].cpu(), levels)
        width = 128 if kind is Activation.INT8_BLOCK else k
        np.testing.assert_array_equal(np.repeat(scale.cpu().numpy(), width, axis=1)[:, :k], scales)
    for zero in (None, -77, 127):
        given = {"range_scale": on(np.array([0.013], np.float32)), "range_zero": None}
        if zero is not None:
            given["range_zero"] = on(np.array([zero], np.int8))
        a, scale = activations.quantize(on(x), Activation.INT8_STATIC, norm=on(norm), epsilon=EPSILON, **given)
        expected = quantize_static(seen, np.float32(0.013), zero) + (zero or 0)
        np.testing.assert_array_equal(a.cpu(), expected)
        assert scale.shape == (3, 1) and (scale == np.float32(0.013)).all()
    np.testing.assert_array_equal(activations.prepared(on(x), on(norm), EPSILON).cpu(), seen)


def test_halves_are_rounded_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    a, _ = activations.quantize(on(x), Activation.INT8_TOKEN)
    assert a.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_scale_or_stays_nan(bad: float) -> None:
    x, norm = drawn(2, 300)
    x[1, 200] = bad
    for kind, where in ((Activation.INT8_TOKEN, 0), (Activation.INT8_BLOCK, 1)):
        for given in (None, on(norm)):
            _, scale = activations.quantize(on(x), kind, norm=given, epsilon=EPSILON)
            assert torch.isfinite(scale[0]).all() and torch.isnan(scale[1, where])
    _, scale = activations.quantize(on(x), Activation.INT8_STATIC, range_scale=on(np.array([0.1], np.float32)))
    assert torch.isfinite(scale[0]).all() and torch.isnan(scale[1]).all()
    assert activations.prepared(on(x)).isnan().nonzero().tolist() == [[1, 200]]


@pytest.mark.parametrize("gate", list(Gate))
def test_the_edges_of_partial_sums(gate: Gate) -> None:
    rng = np.random.default_rng(0)
    partial, bias = rng.standard_normal((3, 2, 96)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    partial[:, 1, 3], partial[:, 1, 4] = -1e30, 40
    residual = rng.standard_normal((2, 48 if gate else 96)).astype(np.float32)
    y = edges.finish(on(partial), 96, torch.float32, bias=on(bias), residual=on(residual), gate=gate)
    product = ((partial[0] + partial[1]) + partial[2]) + bias
    expected = linear_edges.finished(product, {"residual": residual}, {"gate": int(gate)})
    np.testing.assert_allclose(y.cpu(), expected, rtol=2e-6, atol=2e-6)


# ---- dispatch

RULE = {"kernel": "dot", "config": {"block_m": 16, "block_n": 64, "block_k": 64, "split": 0, "warps": 4, "stages": 2}}
CALL = {"format": "int4-g32-sym", "activation": "float", "dtype": "float16", "outputs": 64, "inputs": 128}


def table(*rules: dict, name: str = "generic") -> dict:
    return {"schema": 1, "devices": {name: list(rules)}}


def choose(rows: int = 1, device: str = "some GPU", **changed) -> dispatch.Choice:
    return dispatch.choose("linear_nbit", rows=rows, device=device, **{**CALL, **changed})


def test_every_op_has_a_kernel_in_the_shipped_table() -> None:
    from qcompiler.ops import SPECS

    for op in SPECS:
        for rows in (0, 1, 2, 33, 100, 5000):
            for activation in Activation:
                for format in ("int4-g32-sym", "int8-row-sym", "vq2d64-b32x256-g128"):
                    call = {**CALL, "format": format, "activation": activation.label}
                    assert dispatch.choose(op, rows=rows, device="x", **call).kernel in dispatch.KERNELS


def test_the_first_rule_that_fits_is_taken_and_the_device_comes_before_generic() -> None:
    few, many = {**RULE, "rows": [1, 4]}, {"kernel": "matmul", "config": {"chunk": 0}}
    with dispatch.override(table(few, many)):
        assert [choose(rows).kernel for rows in (1, 4, 5)] == ["dot", "dot", "matmul"]
    own = {"schema": 1, "devices": {"my GPU": [{**many, "format": ["int4-*"]}], "generic": [RULE]}}
    with dispatch.override(own):
        assert choose(device="my GPU").kernel == "matmul"
        assert choose(device="my GPU", format="int8-row-sym").kernel == choose().kernel == "dot"
    assert choose().kernel == "gemv"


def test_a_file_named_in_the_environment_comes_before_the_shipped_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table({**RULE, "outputs": [64, 64]})))
    monkeypatch.setenv(dispatch.VARIABLE, str(path))
    assert choose().place.startswith(str(path)) and choose(outputs=65).kernel == "gemv"
    monkeypatch.delenv(dispatch.VARIABLE)
    assert choose().kernel == "gemv"


@pytest.mark.parametrize(
    "rule,message",
    [
        ({**RULE, "kernel": "fast"}, "kernel is 'fast', expected one of gemv"),
        ({**RULE, "row": [1, 2]}, "unknown key 'row'"),
        ({**RULE, "rows": [2, 1]}, r"rows is \[2, 1\], expected \[least, most\]"),
        ({**RULE, "format": 4}, "format is 4, expected a pattern"),
        ({**RULE, "config": {**RULE["config"], "block_m": 24}}, "block_m is 24, expected a power of 2 from 16 to 256"),
        ({**RULE, "config": {**RULE["config"], "chunk": 1}}, "kernel 'dot' has no 'chunk'"),
        ({**RULE, "config": {"block_m": 16}}, "kernel 'dot' needs 'block_n'"),
        (7, "a rule is an object, found 7"),
    ],
)
def test_a_table_that_is_none_says_where(rule, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        dispatch.parse(table(RULE, rule), "f.json")
    assert "f.json: devices.generic[1]" in str(caught.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with pytest.raises(InputError, match="cannot be read"):
        dispatch.load(path)
    path.write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        dispatch.load(path)
    path.write_text('{"schema": 2}')
    with pytest.raises(InputError, match="schema is 2, expected 1"):
        dispatch.load(path)
    with dispatch.override(table({**RULE, "rows": [1, 1]})):
        assert choose(2).kernel == "gemv"  # the shipped table is behind it


def test_a_split_fills_the_device_and_never_exceeds_the_steps() -> None:
    assert dispatch.splits(0, programs=10, steps=100, processors=10) == 4
    assert dispatch.splits(0, programs=1000, steps=100, processors=10) == 1
    assert dispatch.splits(0, programs=1, steps=3, processors=10) == 3
    assert dispatch.splits(7, programs=1, steps=3, processors=10) == 3


# ---- errors


def test_dtypes_that_the_kernels_do_not_take() -> None:
    with pytest.raises(UnsupportedError, match="x is torch.float64, the GPU kernels take float32, float16, bfloat16"):
        device.require(DEVICE, "linear_nbit", torch.float64)


def test_a_gpu_that_is_too_old(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "_name", lambda index: "Old GPU")
    monkeypatch.setattr(device, "capability", lambda index: (7, 5))
    with pytest.raises(UnsupportedError, match=r"Old GPU has compute capability 7\.5, the kernels need 8\.0 \(Ampere\) or"):
        device.require(torch.device("cuda", 0), "linear_nbit", torch.float16)
    monkeypatch.setattr(device, "capability", lambda index: (8, 0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        device.require(torch.device("cuda", 0), "linear_nbit", dtype)


def test_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="no GPU was found"):
        device.require(torch.device("cuda", 0), "linear_nbit", torch.float16)


def test_triton_is_imported_on_first_use_and_said_to_be_missing() -> None:
    code = """
        import sys, importlib.util
        import qcompiler.ops.torch_ops
        assert not [name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("qcompiler.gpu")]
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "triton" else find(name)
        try:
            import qcompiler.gpu
        except Exception as error:
            print(type(error).__name__, error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("UnsupportedError the ops run on a GPU with kernels in Triton, which is not"), run.stderr
