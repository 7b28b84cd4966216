"""What packed weights of every kind have in common: their formats read back from an op's attributes, their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qcompiler.ops import layout, vq_layout
from qcompiler.ops.formats import AffineFormat, VqFormat, WeightFormat


def packed_bytes_of(n: int, k: int, format: WeightFormat) -> dict[str, int]:
    """Bytes of a packed matrix `[n, k]` by what they are; the values sum to the size of its tensors.

    Keys: `codes`, `scales`, `padding`, and `zeros` (affine) or `codebooks` (vector-quantized).
    """
    return vq_layout.packed_bytes(n, k, format) if isinstance(format, VqFormat) else layout.packed_bytes(n, k, format)


def format_of(attributes: Mapping[str, int], present: Collection[str] = ()) -> WeightFormat:
    """The format of a packed weight.

    Args:
        attributes: of the op that reads it, by name.
        present: names of the op's inputs that are there; `zeros` among them makes an affine weight asymmetric.

    Raises:
        KeyError: an attribute is missing.
        ValueError: the attributes describe no format.
    """
    if "centroids" in attributes:
        sides = attributes["block_rows"], attributes["block_columns"]
        return VqFormat(attributes["dim"], attributes["centroids"], *sides, attributes["group"])
    return AffineFormat(attributes["bits"], attributes["group"], "zeros" not in present)
