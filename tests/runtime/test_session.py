"""Sessions: logits as torch computes them, caches in place, limits, what they refuse, what they import."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.errors import CapacityError, InputError, UnsupportedError, UsageError
from qcompiler.runtime import library, options
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.cache import GrowingCache, SharedCache
from qcompiler.runtime.decoder import OnnxDecoder
from qcompiler.runtime.session import PIECE, Session, check_onnxruntime, session_options
from tests.artifacts import reference_artifact, reference_model, scratch, write_manifest

KINDS = ("shared", "growing")
TOKENS = np.random.default_rng(0).integers(0, 4096, 90)


def expected_logits(tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference_model()(torch.tensor(tokens)[None]).logits[0].numpy()


def decoder_of(session: Session) -> OnnxDecoder:
    assert isinstance(session.decoder, OnnxDecoder)
    return session.decoder


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forced_logits_are_those_of_torch(kind: str) -> None:
    session = Session(reference_artifact(kind))
    logits = session.logits(TOKENS)
    assert logits.shape == (90, 4096) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(TOKENS), atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_pieces_are_those_of_one_piece(kind: str) -> None:
    tokens = np.random.default_rng(1).integers(0, 4096, 2 * PIECE + 3)
    logits = Session(reference_artifact(kind)).logits(tokens)
    np.testing.assert_allclose(logits, expected_logits(tokens), atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_then_steps_are_teacher_forcing(kind: str) -> None:
    expected = expected_logits(TOKENS)
    session = Session(reference_artifact(kind), capacity=16)
    np.testing.assert_allclose(session.prefill(TOKENS[:20]), expected[19], atol=2e-4)
    for position in range(20, 70):
        np.testing.assert_allclose(session.step(int(TOKENS[position])), expected[position], atol=2e-4)
    np.testing.assert_allclose(session.prefill(TOKENS[70:]), expected[-1], atol=2e-4)
    assert session.length == 90


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_reset_nothing_is_left_of_the_text_before(kind: str) -> None:
    session = Session(reference_artifact(kind))
    first = session.logits(TOKENS[:30])
    session.prefill(TOKENS[30:])
    session.step(5)
    session.reset()
    assert session.length == 0
    np.testing.assert_array_equal(session.logits(TOKENS[:30]), first)


def test_shared_and_growing_caches_give_the_same_logits() -> None:
    shared, growing = (Session(reference_artifact(kind), threads=1) for kind in KINDS)
    for session in (shared, growing):
        session.prefill(TOKENS[:10])
    for token in TOKENS[10:40]:
        np.testing.assert_array_equal(shared.step(int(token)), growing.step(int(token)))


def test_a_shared_cache_stays_where_it_is() -> None:
    session = Session(reference_artifact("shared"), capacity=64)
    cache = decoder_of(session).cache
    assert isinstance(cache, SharedCache)
    session.prefill(TOKENS[:8])
    before = [value.data_ptr() for value in cache.values]
    for token in TOKENS[8:40]:
        session.step(int(token))
    assert [value.data_ptr() for value in cache.values] == before
    assert cache.reallocations == 0
    # What a binding gives back as the present is the buffer that went in as the past.
    presents = decoder_of(session)._step.get_outputs()[: len(before)]
    assert [value.data_ptr() for value in presents] == before


def test_a_full_shared_cache_doubles_up_to_the_context() -> None:
    session = Session(reference_artifact("shared"), capacity=8)
    cache = decoder_of(session).cache
    assert isinstance(cache, SharedCache)
    session.prefill(TOKENS[:8])
    capacities = []
    for token in TOKENS[8:70]:
        session.step(int(token))
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [16, 32, 64, 128] and cache.reallocations == 4
    np.testing.assert_allclose(session.step(int(TOKENS[70])), expected_logits(TOKENS[:71])[-1], atol=2e-4)
    session.reset()
    session.prefill(np.zeros(1000, np.int64))
    assert cache.capacity == 1024


def test_a_growing_cache_is_handed_on_without_a_copy() -> None:
    session = Session(reference_artifact("growing"))
    cache = decoder_of(session).cache
    assert isinstance(cache, GrowingCache)
    session.prefill(TOKENS[:5])
    assert cache.values[0].shape() == [1, 2, 5, 64]
    session.step(1)
    assert cache.values[0].shape() == [1, 2, 6, 64]


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_is_a_limit_with_numbers(kind: str) -> None:
    session = Session(reference_artifact(kind))
    with pytest.raises(CapacityError, match="1030 tokens are 1030 positions, but the model's context is 1024: 6 too"):
        session.prefill(np.zeros(1030, np.int64))
    assert session.length == 0
    session.prefill(np.zeros(1024, np.int64))
    with pytest.raises(CapacityError, match="1024 in the cache and 1 more tokens are 1025 positions"):
        session.step(0)
    with pytest.raises(CapacityError, match="capacity is 1025"):
        Session(reference_artifact(kind), capacity=1025)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "expected one or more whole numbers"),
        ([1.5], "expected one or more whole numbers"),
        ([[1, 2]], "of shape \\[1, 2\\]"),
        ([3, 4096], "token 4096 is outside the vocabulary of 4096"),
        ([-1], "token -1 is outside"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Session(reference_artifact()).prefill(tokens)


def test_an_old_onnxruntime_is_refused() -> None:
    check_onnxruntime()
    check_onnxruntime("1.21.0")
    check_onnxruntime("2.0.0.dev1")
    for version in ("1.20.2", "0.9", "unknown"):
        with pytest.raises(UnsupportedError, match="expected 1.21 or newer"):
            check_onnxruntime(version)


def test_running_without_the_library_needs_a_newer_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    options.check_portable()
    options.check_portable("1.27.0")
    for version in ("1.26.9", "1.21.0"):
        with pytest.raises(UnsupportedError, match=f"onnxruntime is {version}.* needs 1.27 or newer: pip install"):
            options.check_portable(version)
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    session_options()
    with pytest.raises(UnsupportedError, match="onnxruntime is 1.26.0.* or run with the op library"):
        session_options(portable=True)


# ---- modules and encoders


def module_artifact(target: str = "onnx-stock") -> Path:
    """`sum = mask * (ids + token types)` as an encoder."""
    names = {"input_ids": "tokens", "attention_mask": "mask", "token_type_ids": "token_types"}
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (int64[1, n] input_ids, int64[1, n] attention_mask, int64[1, n] token_type_ids) => (int64[1, n] sum) {
            both = Add(input_ids, token_type_ids)
            sum = Mul(both, attention_mask)
        }"""
    folder = scratch()
    ir.save(ir.from_onnx_text(text), folder / "model.onnx")
    tensors = [{"name": name, "dtype": "int64", "shape": [1, "n"], "role": role} for name, role in names.items()]
    output = {"name": "sum", "dtype": "int64", "shape": [1, "n"], "role": "hidden"}
    manifest = {"kind": "encoder", "target": target, "inputs": tensors, "outputs": [output]}
    return write_manifest(folder, manifest)


def test_an_encoder_runs_with_arrays_and_fills_in_masks_and_types() -> None:
    session = Session(module_artifact())
    np.testing.assert_array_equal(session.run(input_ids=[[3, 4]])["sum"], [[3, 4]])
    np.testing.assert_array_equal(session.run(input_ids=[[3, 4]], attention_mask=[[1, 0]])["sum"], [[3, 0]])


def test_wrong_arrays_are_refused() -> None:
    session = Session(module_artifact())
    for array in ([[1.5, 2.0]], np.full((1, 2), np.nan, np.float32), [["a", "b"]], [["1", "2"]], [[None, 1]]):
        with pytest.raises(UsageError, match="the input input_ids is .*, the graph takes int64, which does not hold"):
            session.run(input_ids=array)
    np.testing.assert_array_equal(session.run(input_ids=np.array([[3, 4]], np.int32))["sum"], [[3, 4]])
    np.testing.assert_array_equal(session.run(input_ids=[[3, 4]], attention_mask=[[1.0, 0.0]])["sum"], [[3, 0]])
    with pytest.raises(UsageError, match="no input is called ids; the inputs are input_ids"):
        session.run(ids=[[1]])
    with pytest.raises(UsageError, match=r"the input input_ids \(int64 \[1, 'n'\]\) is missing"):
        session.run(attention_mask=[[1]])
    with pytest.raises(UsageError, match=r"input_ids has shape \[2, 1\], expected \[1, 'n'\]"):
        session.run(input_ids=[[1], [2]])
    with pytest.raises(UsageError, match="not a decoder"):
        session.prefill([1])


# ---- the op library


def test_without_the_library_a_session_is_refused_unless_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise library.LibraryError("the op library is not built")

    monkeypatch.setattr(library, "load", missing)
    monkeypatch.setattr(options, "_warned_portable", False)
    path = module_artifact("onnx")
    with pytest.raises(library.LibraryError):
        Session(path)
    with pytest.raises(library.LibraryError):
        session_options()
    with pytest.warns(RuntimeWarning, match="without the op library"):
        session = Session(path, portable=True)
    assert session.run(input_ids=[[3]])["sum"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        Session(path, portable=True)


def test_a_newer_packed_layout_is_refused() -> None:
    folder = module_artifact("onnx")
    manifest = dict(open_artifact(folder).manifest, layout_version=99)
    manifest.pop("files"), manifest.pop("manifest_sha256")
    with pytest.raises(UnsupportedError, match="packed layout version 99"):
        Session(write_manifest(folder, manifest), portable=True)


def test_a_graph_that_cannot_be_loaded_is_named() -> None:
    folder = scratch()
    (folder / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="model.onnx cannot be loaded by ONNX Runtime"):
        Session(write_manifest(folder, {}))


def test_threads_reach_the_session() -> None:
    assert options.plain_options(3).intra_op_num_threads == 3
    assert isinstance(options.plain_options(), onnxruntime.SessionOptions)
    with pytest.raises(UsageError, match="threads is 0"):
        options.plain_options(0)


# ---- what is needed to run

_BLOCKED = """
import sys
class Blocker:
    names = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "rich", "pydantic", "click", "yaml", "jinja2"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
from qcompiler.runtime.bench import bench
from qcompiler.runtime.generate import generate
from qcompiler.runtime.session import Session
from qcompiler.runtime import chat, tokens
print("".join(token.text for token in generate(Session(sys.argv[2]), "def main():", max_tokens=4)))
"""


def test_running_needs_numpy_onnxruntime_and_tokenizers_only() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _BLOCKED, str(root), str(reference_artifact())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
