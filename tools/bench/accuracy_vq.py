"""Variants and claims of vector quantization for `tools/bench/accuracy`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcompiler import recipe as recipes
from tools.bench.accuracy_variants import Claim, Variant

ACTIVATIONS = "int8-block128"
FOUR_BITS = {"bits": 4, "group": 32}
# Integers that take as many bits as a format with codebooks, or a little more: without zero points, and with.
INTEGERS = {"2.25": (2, 64), "3.25": (3, 64), "4.25": (4, 64)}


def _low(name: str, linear: dict[str, Any], passes: list[Any], after: list[Any] = []) -> Variant:  # noqa: B006
    """Embedding and head in 4 bits by GPTQ, as the recipes of few bits have them: at equal total size only the body differs."""
    head = {**FOUR_BITS, "activations": ACTIVATIONS}
    recipe = {"name": name, "linear": {**linear, "activations": ACTIVATIONS}, "embed": FOUR_BITS, "head": head}
    untied = {"round_to_nearest": {"kind": "embedding", "tied": False}}
    return Variant(name, recipe | {"passes": [untied, *passes, {"gptq": {"head": True}}, "round_to_nearest", *after]})


def vq_variants() -> Iterator[Variant]:
    """GPTQ at each size, and vectors of two and of four."""
    for size, (bits, group) in INTEGERS.items():
        yield _low(f"gptq-{size}", {"bits": bits, "group": group}, [])
        if bits < 4:
            yield _low(f"gptq-{size}-asym", {"bits": bits, "group": group, "symmetric": False}, [])
    for name in ("vq2", "vq2-4d", "vq3", "vq4"):
        yield _low(f"gptvq-{name}", {"vq": name}, ["gptvq"])
    for name in ("best-2", "best-3"):
        yield Variant(name, recipes.to_dict(recipes.load(name)))


def ablation_variants(format: str) -> Iterator[Variant]:
    """Each addition to the sweep alone, and all of them."""
    plain = {"rounds": 0, "passes": 0, "ordering": "none"}
    guide, distil = {"guide": {}}, {"distill_end_to_end": {"head": True}}

    def variant(name: str, options: dict[str, Any], before: list[Any] = [], after: list[Any] = []) -> Variant:  # noqa: B006
        return _low(f"{format}-{name}", {"vq": format}, [*before, {"gptvq": options}], after)

    yield variant("sweep", plain)
    yield variant("codebooks", plain | {"rounds": 2})
    yield variant("reassign", plain | {"passes": 1})
    yield variant("ordering", plain | {"ordering": "activation"})
    yield variant("asymmetric", plain | {"asymmetric": True})
    yield variant("guided", plain | {"guided": True}, before=[guide])
    yield variant("distilled", plain, after=[distil])
    yield variant("solver", {})
    yield variant("solver-guided", {"guided": True}, before=[guide])
    yield variant("all", {"guided": True}, before=[guide], after=[distil])


def head_variants() -> Iterator[Variant]:
    """Embedding and head alone, the body in float: what they are of the other rows."""
    head = {**FOUR_BITS, "activations": ACTIVATIONS}
    kept = {"linear": "float", "embed": FOUR_BITS, "head": head, "allow": {"min_coverage": 0}}
    untied = {"round_to_nearest": {"kind": "embedding", "tied": False}}
    yield Variant("head-rtn", {"name": "head-rtn", **kept, "passes": ["round_to_nearest"]}, False)
    yield Variant("head-gptq", {"name": "head-gptq", **kept, "passes": [untied, {"gptq": {"head": True}}, "round_to_nearest"]})


def vq_claims() -> Iterator[Claim]:
    """What is to hold at equal total bits per weight."""
    for size, better in (("2.25", "gptvq-vq2"), ("3.25", "gptvq-vq3"), ("4.25", "gptvq-vq4")):
        yield Claim("vq", f"gptq-{size}", better)
        if size != "4.25":
            yield Claim("vq", f"gptq-{size}-asym", better, 0.5 if size == "3.25" else 1.0)
    yield Claim("vq", "gptvq-vq2", "gptvq-vq2-4d")
    yield Claim("vq", "gptvq-vq2", "best-2", 0.8)
    yield Claim("vq", "gptvq-vq3", "best-3", 0.8)
    for format in ("vq2", "vq3"):
        for row in ("codebooks", "reassign", "ordering", "asymmetric", "guided", "distilled", "solver"):
            yield Claim("ablations", f"{format}-sweep", f"{format}-{row}")
        yield Claim("ablations", f"{format}-solver", f"{format}-solver-guided")
        yield Claim("ablations", f"{format}-solver-guided", f"{format}-all")
