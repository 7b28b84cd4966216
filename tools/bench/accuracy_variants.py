"""What `tools/bench/accuracy` compiles, and what is to come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

LOOKUPS = {"round_to_nearest": {"kind": "embedding"}}
INT8_HEAD = {"bits": 8, "activations": "int8-token"}


@dataclass(frozen=True)
class Variant:
    """A recipe to compile, and whether calibration text decides anything in it."""

    name: str
    recipe: dict[str, Any]
    calibrated: bool = True


@dataclass(frozen=True)
class Claim:
    """`better` is to beat `base`: its KL divergence is to be at most `most` times the base's."""

    section: str
    base: str
    better: str
    most: float = 1.0


def weight_variants(bits: int, group: int) -> Iterator[Variant]:
    """Rounding, AWQ, GPTQ and GPTAQ at one width."""
    linear = {"bits": bits, "group": group, "activations": "int8-block128"}
    label = f"int{bits}-g{group}"

    def variant(method: str, passes: list[Any], calibrated: bool = True) -> Variant:
        name = f"{label}-{method}"
        return Variant(name, {"name": name, "linear": linear, "passes": passes}, calibrated)

    yield variant("rtn", [{"round_to_nearest": {"clipping": "mse"}}], False)
    yield variant("awq", [LOOKUPS, "awq", "clip_search", "round_to_nearest"])
    yield variant("gptq", [LOOKUPS, "gptq", "round_to_nearest"])
    yield variant("gptaq", [LOOKUPS, {"gptq": {"asymmetric": True}}, "round_to_nearest"])


def static_variants() -> Iterator[Variant]:
    """W8A8 with static activations: plain, with corrected biases, smoothed."""
    linear = {"bits": 8, "activations": "int8-static"}
    observe = ["place_observers", "calibrate_ranges"]

    def variant(name: str, passes: list[Any]) -> Variant:
        return Variant(name, {"name": name, "linear": linear, "head": INT8_HEAD, "passes": passes})

    yield variant("static", ["round_to_nearest", *observe])
    yield variant("static-bias", ["round_to_nearest", *observe, "bias_correction"])
    yield variant("static-smooth", ["smooth_quant", "round_to_nearest", *observe])
    yield variant("static-smooth-bias", ["smooth_quant", "round_to_nearest", *observe, "bias_correction"])


def distillation_variants() -> Iterator[Variant]:
    """W4A8 with one activation scale a token: rounded, and distilled block by block."""
    linear = {"bits": 4, "group": 128, "activations": "int8-token"}
    yield Variant("w4a8-rtn", {"name": "w4a8-rtn", "linear": linear, "passes": ["round_to_nearest"]}, False)
    passes = ["round_to_nearest", "distill_blocks"]
    yield Variant("w4a8-distilled", {"name": "w4a8-distilled", "linear": linear, "passes": passes})


def sensitivity_variants(model: str, keep: int = 5, draws: int = 5) -> Iterator[Variant]:
    """int4 with the most sensitive layers at 8 bits, and with as many random ones."""
    from qcompiler.sensitivity import sensitivity

    found = sensitivity(model, bits=(4,), base="int4", keep=keep)
    names = [layer["name"] for layer in found["layers"]]
    chosen = found["ranking"]["4"][:keep] if "4" in found["ranking"] else found["ranking"][4][:keep]
    linear = {"bits": 4, "group": 32, "activations": "int8-block128"}

    def variant(name: str, kept: list[str]) -> Variant:
        high = {"bits": 8, "activations": "int8-token"}
        overrides = [{"select": {"name": layer}, "scheme": high} for layer in kept]
        return Variant(name, {"name": name, "linear": linear, "overrides": overrides}, False)

    yield variant("keep-sensitive", list(chosen))
    for draw in range(draws):
        picked = np.random.default_rng(draw).permutation([n for n in names if n not in chosen])[:keep].tolist()
        yield variant(f"keep-random-{draw}", picked)


def claims() -> list[Claim]:
    """What is to hold."""
    found = []
    for bits in (4, 3):
        for group in (32, 128):
            label = f"int{bits}-g{group}"
            found.append(Claim("weights", f"{label}-rtn", f"{label}-gptq", 0.8))
            found.append(Claim("weights", f"{label}-rtn", f"{label}-awq"))
            found.append(Claim("weights", f"{label}-gptq", f"{label}-gptaq"))
    found += [Claim("static", "static", "static-bias"), Claim("static", "static", "static-smooth")]
    found.append(Claim("distillation", "w4a8-rtn", "w4a8-distilled"))
    return found + [Claim("sensitivity", f"keep-random-{draw}", "keep-sensitive") for draw in range(5)]
