"""`Session`: an artifact, loaded and ready to run. Needs numpy and onnxruntime only."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from qcompiler.errors import CapacityError, InputError, UnsupportedError, UsageError
from qcompiler.runtime import library
from qcompiler.runtime.artifact import Artifact, open_artifact
from qcompiler.runtime.decoder import Decoder, OnnxDecoder
from qcompiler.runtime.device import Dtype, Placement, check_target
from qcompiler.runtime.fixed import cut, fill
from qcompiler.runtime.options import check_onnxruntime, plain_options, session_options
from qcompiler.runtime.torch_decoder import torch_decoder
from qcompiler.runtime.torch_program import TorchProgram
from qcompiler.runtime.whole import WholeText

__all__ = ["Session", "check_onnxruntime", "session_options"]

# Tokens that go through the graph at once: enough for the products to be efficient, few enough that the attention's
# scores (heads x piece x capacity) and the logits of a piece stay small.
PIECE = 256


class Session:
    """An artifact in ONNX Runtime.

    A decoder keeps the text so far in its cache: `prefill` appends a prompt, `step` one token, `reset` starts anew. One
    without a cache keeps the tokens, and computes the whole text every time. So does an encoder-decoder, whose encoder
    `read`s a text first; `prefill` and `step` are its decoder's. Anything else is called with arrays: `run`. Not for several
    threads at once.

    Args:
        source: the artifact's directory, or an `Artifact`.
        threads: threads inside an operator; None leaves it to ONNX Runtime.
        portable: run without the op library, slowly (target `onnx`).
        capacity: positions that a shared cache has room for at the start; it grows by doubling, up to the context.
        providers: execution providers of ONNX Runtime.
        device: `cpu`, `cuda` or `cuda:N`; a GPU runs artifacts of target `torch`.
        dtype: of float activations, keys and values and float weights: on a GPU `float16` and `bfloat16` too.

    Raises:
        InputError, GateError, UnsupportedError: see `open_artifact`; `find_device` where a device is named.
        LibraryError: the op library is missing and `portable` is not set.
        CapacityError: `capacity` is beyond the context, or the device's free memory is too small.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Artifact,
        *,
        threads: int | None = None,
        portable: bool = False,
        capacity: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        device: str = "cpu",
        dtype: Dtype = "float32",
    ) -> None:
        place = Placement(device, dtype)
        self.artifact = source if isinstance(source, Artifact) else open_artifact(source)
        context = self.artifact.context
        if capacity is not None and capacity < 1:
            raise UsageError(f"capacity is {capacity}, expected at least 1")
        if capacity is not None and context is not None and capacity > context:
            raise CapacityError(f"capacity is {capacity}, but the model's context is {context} positions")
        check_target(self.artifact, place)
        self.onnx: onnxruntime.InferenceSession | None = None
        self._decoder: Decoder | None = None
        self._program: TorchProgram | None = None
        if self.artifact.target == "torch":
            self._program = TorchProgram(self.artifact, threads, place, capacity)
        else:
            self.onnx = _open(self.artifact, threads, portable, providers)
        if self.artifact.whole_text is not None or (self.artifact.kind == "encoder-decoder" and self._generates()):
            self._decoder = WholeText(self.artifact, self._outputs)
        elif self.artifact.kind == "decoder":
            if self._program is not None:
                self._decoder = torch_decoder(self._program, capacity)
            else:
                assert self.onnx is not None
                self._decoder = OnnxDecoder(self.onnx, self.artifact, capacity)

    def _generates(self) -> bool:
        return any(info.role == "logits" and isinstance(info.shape[-1], int) for info in self.artifact.outputs)

    # ---- decoders

    @property
    def decoder(self) -> Decoder:
        """What runs the graph of a decoder. Raises `UsageError` for any other kind of artifact."""
        if self._decoder is None:
            raise UsageError(f"{self.artifact.path} is of kind {self.artifact.kind!r}, not a decoder: use run()")
        return self._decoder

    def read(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Let the encoder of an encoder-decoder read `tokens`; the decoder's text begins anew."""
        if self.artifact.kind != "encoder-decoder":
            raise UsageError(f"{self.artifact.path} is of kind {self.artifact.kind!r}: it has no encoder to read with")
        decoder = self.decoder
        assert isinstance(decoder, WholeText)
        decoder.reset()
        decoder.source = self._checked(tokens)

    @property
    def length(self) -> int:
        """Tokens so far: positions in the cache."""
        return self.decoder.length

    @property
    def vocabulary(self) -> int:
        """Number of logits for each token."""
        return self.decoder.vocabulary

    def reset(self) -> None:
        """Empty the cache."""
        self.decoder.reset()

    def prefill(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append `tokens` to the cache, in pieces; the logits after the last one, float32 [vocabulary].

        Raises `CapacityError`, with the cache as it was, when they do not fit the context.
        """
        ids = self._checked(tokens)
        for piece in self._pieces(ids):
            logits = self.decoder.run(piece, 1)
        return logits[-1]

    def step(self, token: int) -> np.ndarray:
        """Append one token; the logits after it, float32 [vocabulary]."""
        # The checks of `_checked` without its arrays: small models take a fraction of a millisecond a token.
        number = operator.index(token)
        if not 0 <= number < self.vocabulary:
            raise InputError(f"token {number} is outside the vocabulary of {self.vocabulary}")
        self.check_room(1)
        return self.decoder.run(np.array([number], np.int64), 1)[-1]

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The logits after every one of `tokens`, float32 [len(tokens), vocabulary], from an empty cache.

        The cache holds `tokens` afterwards. Where the artifact is not `causal`, all but the last are what the model computes of
        the whole text, and predict nothing.
        """
        self.reset()
        ids = self._checked(tokens)
        return np.concatenate([self.decoder.run(piece, len(piece)) for piece in self._pieces(ids)])

    def _pieces(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` as they go through the graph: in equal pieces and a rest, or as many at once as the graph takes."""
        if isinstance(self.decoder, WholeText):
            return [ids]
        size = min(self.decoder.step or PIECE, PIECE)
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    def check_room(self, new: int) -> None:
        """Raise `CapacityError` when `new` more positions are beyond the model's context."""
        context, length, longest = self.artifact.context, self.length, self.artifact.longest
        if longest is not None and length + new > longest:
            raise _too_long(length + new, self.artifact)
        if context is not None and length + new > context:
            filled = f"{length} in the cache and {new} more" if length else f"{new}"
            raise CapacityError(
                f"{filled} tokens are {length + new} positions, but the model's context is {context}: "
                f"{length + new - context} too many"
            )

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """`tokens` as int64 [n], n at least 1, each within the vocabulary, and room for all of them."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"tokens are {ids.dtype} of shape {list(ids.shape)}, expected one or more whole numbers in one row"
            )
        ids = ids.astype(np.int64, copy=False)
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            wrong = ids[(ids < 0) | (ids >= self.vocabulary)][0]
            raise InputError(f"token {wrong} is outside the vocabulary of {self.vocabulary}")
        self.check_room(len(ids))
        return ids

    # ---- encoders and plain modules

    def run(self, **arrays: Any) -> dict[str, np.ndarray]:
        """Every output of the graph for the given inputs, by name.

        Arrays are converted to the input's type, within its kind or where no number changes. A mask or token types that are not
        given are those of one whole text: all ones, all zeros. Behind a text that is shorter than a graph of one length nothing
        counts.
        """
        infos = {info.name: info for info in self.artifact.inputs}
        if unknown := sorted(arrays.keys() - infos.keys()):
            raise UsageError(f"no input is called {', '.join(unknown)}; the inputs are {', '.join(infos)}")
        given = {name: _as_taken(name, np.asarray(array), infos[name].dtype) for name, array in arrays.items()}
        tokens = next((given[name] for name, info in infos.items() if info.role == "tokens" and name in given), None)
        for name, info in infos.items():
            if name in given:
                continue
            if info.role == "logits_to_keep":
                given[name] = np.array([np.iinfo(np.int32).max], info.dtype)  # all of them
                continue
            if tokens is None or info.role not in ("mask", "token_types", "positions"):
                raise UsageError(f"the input {name} ({info.dtype} {list(info.shape)}) is missing")
            if info.role == "positions":
                given[name] = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape).astype(info.dtype)
            else:
                given[name] = np.full(tokens.shape, int(info.role == "mask"), info.dtype)
        limit, fixed = self.artifact.longest, self.artifact.fixed
        if limit is not None and tokens is not None and tokens.ndim and tokens.shape[-1] > limit:
            raise _too_long(tokens.shape[-1], self.artifact)
        given, length = (given, 0) if fixed is None else fill(self.artifact, fixed, given)
        for name, array in given.items():
            _check_shape(name, array, infos[name].shape)
        outputs = self._outputs(given)
        return outputs if fixed is None else cut(fixed, outputs, length)

    def _outputs(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._program is not None:
            return self._program.run(given)
        assert self.onnx is not None
        names = [info.name for info in self.artifact.outputs]
        return dict(zip(names, self.onnx.run(names, given), strict=True))


def _too_long(length: int, artifact: Artifact) -> CapacityError:
    why = "the model computes longer texts in another way"
    if artifact.fixed is not None:
        why = "its graph has one length; compile it for a longer one (allow: {fixed_length: N} in the recipe)"
    return CapacityError(f"{length} tokens are more than the {artifact.longest} that {artifact.path} was compiled for: {why}")


def _check_shape(name: str, array: np.ndarray, expected: tuple[int | str, ...]) -> None:
    fits = len(array.shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        raise UsageError(f"the input {name} has shape {list(array.shape)}, expected {list(expected)}")


def _open(
    artifact: Artifact, threads: int | None, portable: bool, providers: Sequence[str]
) -> onnxruntime.InferenceSession:
    check_onnxruntime()
    if artifact.target == "onnx":
        if artifact.layout_version > library.LAYOUT_VERSION:
            raise UnsupportedError(
                f"{artifact.path} has packed layout version {artifact.layout_version}, this qcompiler has "
                f"{library.LAYOUT_VERSION}: install a newer one"
            )
        options = session_options(threads, portable=portable)
    else:
        options = plain_options(threads)
    try:
        return onnxruntime.InferenceSession(str(artifact.file(artifact.entry)), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's own errors have no common base
        raise InputError(f"{artifact.path / artifact.entry} cannot be loaded by ONNX Runtime: {error}") from error


def _as_taken(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """An input in the type that the graph takes: of the same kind, or the same numbers."""
    try:
        with np.errstate(invalid="ignore"):
            taken = array.astype(dtype, copy=False)
    except (TypeError, ValueError):
        taken = None
    if taken is None or not (np.can_cast(array.dtype, dtype, casting="same_kind") or np.array_equal(taken, array)):
        raise UsageError(f"the input {name} is {array.dtype}, the graph takes {dtype}, which does not hold its numbers")
    return taken
