"""A recipe from measured sensitivities: the layers that suffer most keep more bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from qcompiler.errors import UsageError
from qcompiler.ops.formats import BITS
from qcompiler.recipe.schema import Override, Recipe, Scheme, Select


def keep_recipe(base: Recipe, layers: Sequence[dict[str, Any]], keep: int, bits: Any = 8) -> Recipe:
    """`base` with overrides that give its `keep` most sensitive layers `bits` instead of their own width.

    Only layers that `base` gives fewer than `bits` are looked at, each by its divergence at the width that `base` gives it;
    group and activations stay `base`'s.

    Args:
        layers: as `sensitivity` returns them.
        bits: 8, 4 or 3.

    Raises:
        UsageError: there are fewer than `keep` such layers, or one's width was not measured.
    """
    measured = sorted({int(b) for layer in layers for b in layer["kld"]})
    found = candidates(base, layers, keep, bits, measured)
    found.sort(key=lambda entry: -entry[0]["kld"][str(entry[1].bits)]["mean"])
    overrides = [
        Override(Select(name=_literal(name)), dataclasses.replace(scheme, bits=bits))
        for layer, scheme in found[:keep]
        # A tied tensor is packed once: whatever else reads it has to have the same format.
        for name in (layer["name"], *layer["tied"])
    ]
    return dataclasses.replace(
        base,
        name=f"{base.name}-keep{keep}",
        description=f"{base.name}, its {keep} most sensitive layers with {bits} bits.",
        overrides=(*base.overrides, *overrides),
    )


def candidates(
    base: Recipe, layers: Sequence[dict[str, Any]], keep: int, bits: int, measured: Sequence[int]
) -> list[tuple[dict[str, Any], Scheme]]:
    """Layers that `bits` would widen, with their schemes in `base`."""
    if bits not in BITS:
        raise UsageError(f"keep_bits is {bits}, expected one of {', '.join(map(str, BITS))}")
    schemes = [(layer, base.scheme(layer["name"], "linear", layer["role"], layer["weights"])) for layer in layers]
    found = [(layer, scheme) for layer, scheme in schemes if isinstance(scheme, Scheme) and scheme.bits < bits]
    if not 1 <= keep <= len(found):
        raise UsageError(
            f"keep is {keep}, but recipe {base.name} gives {len(found)} of {len(layers)} layers fewer than {bits} bits; "
            f"expected 1 to {len(found)}"
        )
    missing = sorted({scheme.bits for _, scheme in found} - set(measured))
    if missing:
        raise UsageError(
            f"recipe {base.name} gives layers {', '.join(map(str, missing))} bits, which are not among the measured "
            f"{', '.join(map(str, measured))}; add them (bits)"
        )
    return found


def _literal(name: str) -> str:
    """A glob that matches this name alone."""
    pattern = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    assert fnmatchcase(name, pattern)
    return pattern
