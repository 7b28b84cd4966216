"""Our kernels as sides: every format, instruction set and kind of activations, on one mapped file of packed tensors.

The file has a region for each kind of tensor, filled with random bytes that are valid in every format: codes, float16 scales,
codebooks. A format's matrices lie one after another in each, aligned as in an artifact; formats share regions, so the file is
little larger than one format's weights.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qcompiler.lower.external import ALIGNMENT, LARGE, LARGE_ALIGNMENT
from qcompiler.ops import layout, vq_layout
from qcompiler.ops.formats import Activation, AffineFormat, VqFormat, WeightFormat
from qcompiler.recipe.schema import VQ_FORMATS
from qcompiler.runtime import library
from qcompiler.runtime.library_vq import VqWeight
from tools.bench.kernels_side import CHECKED, Case, Opened, Skipped

FORMATS: dict[str, WeightFormat] = {
    "int8": AffineFormat(8, 0),
    **{f"int{bits}-g{group}": AffineFormat(bits, group) for bits in (4, 3, 2) for group in (32, 128)},
    **{name: VqFormat.parse(label) for name, label in VQ_FORMATS.items() if name != "fp4"},
}
REGIONS = {"codes": "codes", "codebooks": "codebooks", "scales": "scales", "codebook_scales": "scales"}


def tensors(n: int, k: int, format: WeightFormat) -> dict[str, int]:
    """Bytes of every tensor of a packed matrix, in the order in which an artifact has them."""
    if isinstance(format, AffineFormat):
        return {"codes": _size(layout.codes_shape(n, k, format.bits)), "scales": 2 * _size(layout.scales_shape(n, k, format))}
    return {
        "codes": _size(vq_layout.codes_shape(n, k, format)),
        "codebooks": _size(vq_layout.codebooks_shape(n, k, format)),
        "codebook_scales": 2 * _size(format.blocks(n, k)),
        "scales": 2 * _size(vq_layout.scales_shape(n, k, format)),
    }


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def place(n: int, k: int, format: WeightFormat, matrices: int) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Offsets of every matrix' tensors within their regions, and how far each region reaches."""
    ends = dict.fromkeys(REGIONS.values(), 0)
    places = []
    for _ in range(matrices):
        place = {}
        for name, size in tensors(n, k, format).items():
            step = LARGE_ALIGNMENT if size >= LARGE else ALIGNMENT
            place[name] = -(-ends[REGIONS[name]] // step) * step
            ends[REGIONS[name]] = place[name] + size
        places.append(place)
    return places, ends


class Weights:
    """A mapped temporary file in `folder` that holds the matrices of any of the formats in a case of that size."""

    def __init__(self, case: Case, formats: Iterable[WeightFormat], folder: Path | None = None, seed: int = 0) -> None:
        sizes = dict.fromkeys(REGIONS.values(), 0)
        for format in formats:
            _, ends = place(case.n, case.k, format, case.count(sum(tensors(case.n, case.k, format).values())))
            sizes = {region: max(sizes[region], ends[region]) for region in sizes}
        self._file = tempfile.NamedTemporaryFile(prefix="qcompiler-kernels-", dir=folder)
        self.base: dict[str, int] = {}
        rng, offset = np.random.default_rng(seed), 0
        for region, size in sizes.items():
            self.base[region] = offset
            for begin in range(0, size, 2**24):
                self._file.write(_content(rng, region, min(2**24, size - begin)))
            offset += -(-size // LARGE_ALIGNMENT) * LARGE_ALIGNMENT
            self._file.write(b"\0" * (offset - self._file.tell()))
        self._file.flush()
        self.codes_bytes = sizes["codes"]
        self.data = np.memmap(self._file.name, np.uint8, "r", shape=(max(1, offset),))

    @property
    def address(self) -> int:
        return self.data.ctypes.data

    def part(self, name: str, offset: int, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
        """The beginning of a tensor as an array of the mapped file."""
        begin = self.base[REGIONS[name]] + offset
        return self.data[begin : begin + _size(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def _content(rng: np.random.Generator, region: str, size: int) -> bytes:
    if region == "scales":
        return rng.uniform(0.005, 0.015, -(-size // 2)).astype(np.float16).tobytes()[:size]
    return rng.bytes(size)


@dataclass(frozen=True)
class Ours:
    """One format of ours with one kind of activations. `isa` None: the one in use."""

    format_name: str
    weights: Weights = field(repr=False, compare=False)
    activation: Activation = Activation.INT8_BLOCK
    isa: str | None = None
    family: str = "ours"

    @property
    def name(self) -> str:
        parts = [self.format_name]
        if self.activation != Activation.INT8_BLOCK:
            parts.append(self.activation.label)
        return " ".join([*parts, *([self.isa] if self.isa else [])])

    def open(self, case: Case) -> Opened:
        format = FORMATS[self.format_name]
        if isinstance(format, VqFormat) and self.activation == Activation.INT8_TOKEN:
            raise Skipped("codebooks take float activations, or int8 with a scale per 128 inputs")
        ours = library.load()
        size = sum(tensors(case.n, case.k, format).values())
        places, _ = place(case.n, case.k, format, case.count(size))
        x, y = case.x(), np.empty((case.rows, case.n), np.float32)
        context = library._context(ours, case.threads, self.isa)
        function = ours.qc_linear_vq if isinstance(format, VqFormat) else ours.qc_linear_nbit
        calls = []
        for at in places:
            weight = self._weight(case, format, at)
            between = (None,) if isinstance(format, VqFormat) else (None, None)  # edges; range and edges
            arguments = (self.activation.value, *between, case.rows, x.ctypes.data, None, y.ctypes.data)
            calls.append((ctypes.byref(context), ctypes.byref(weight), *arguments))

        def walk() -> None:
            for arguments in calls:
                if function(*arguments):
                    raise RuntimeError(ours.qc_last_error().decode())

        def product() -> tuple[np.ndarray, np.ndarray]:
            if function(*calls[0]):
                raise RuntimeError(ours.qc_last_error().decode())
            some = self._dequantized(case, format, places[0])
            return y[:, : len(some)], x @ some.T

        return Opened(walk, len(calls), size, product)

    def _weight(self, case: Case, format: WeightFormat, at: dict[str, int]) -> ctypes.Structure:
        address = {name: self.weights.address + self.weights.base[REGIONS[name]] + offset for name, offset in at.items()}
        if isinstance(format, AffineFormat):
            return library._Weight(case.n, case.k, format.bits, format.group, address["codes"], address["scales"], None)
        numbers = format.dim, format.centroids, format.block_rows, format.block_columns, format.group
        parts = (address[name] for name in ("codes", "codebooks", "codebook_scales", "scales"))
        return VqWeight(case.n, case.k, *numbers, *parts)

    def _dequantized(self, case: Case, format: WeightFormat, at: dict[str, int]) -> np.ndarray:
        """The first rows of a matrix as float32: whole tiles are whole at the beginning of every tensor."""
        n, k = min(CHECKED, case.n), case.k
        part = self.weights.part
        scales_shape = -(-n // 16), format.groups(k), 16
        scales = layout.unpack_scales(part("scales", at["scales"], scales_shape, np.float16), n)
        if isinstance(format, AffineFormat):
            codes = layout.unpack_codes(part("codes", at["codes"], layout.codes_shape(n, k, format.bits)), n, k, format.bits)
            return layout.dequantize(codes, scales, None, format)
        indices = vq_layout.unpack_indices(part("codes", at["codes"], vq_layout.codes_shape(n, k, format)), n, k, format)
        books = part("codebooks", at["codebooks"], vq_layout.codebooks_shape(n, k, format), np.int8)
        shared = part("codebook_scales", at["codebook_scales"], format.blocks(n, k), np.float16)
        return vq_layout.dequantize(indices, vq_layout.unpack_codebooks(books), shared, scales, k, format)
