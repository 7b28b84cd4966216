"""What a recipe is: frozen dataclasses, built from YAML or in Python, one vocabulary, parsed by pydantic.

A recipe says which format every site gets (`linear`, `embed`, `head`, `overrides`), which passes run between analysis and
rewriting (`passes`, in order), and what is allowed to go wrong (`allow`). Normalisation, analysis and rewriting are always
there and are not written down.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from qcompiler.ops.formats import Activation, AffineFormat

_STRICT = ConfigDict(extra="forbid")
ActivationLabel = Literal["float", "int8-token", "int8-block128", "int8-static"]


@dataclass(frozen=True, config=_STRICT)
class Scheme:
    """The format of a weight and of the activations that meet it.

    Attributes:
        bits: 8, 4, 3 or 2.
        group: columns that share a scale: 32, 64, 128, 0 for the whole row (per channel), or `tensor` for the whole matrix
            (its scale is stored with every row, in the format of `group: 0`).
        symmetric: no stored zero points.
        activations: `float`, `int8-token` (one scale a token), `int8-block128` (one per 128 inputs) or `int8-static` (one
            calibrated scale and zero point a layer).
    """

    bits: Literal[8, 4, 3, 2]
    group: Literal[0, 32, 64, 128, "tensor"] = 0
    symmetric: bool = True
    activations: ActivationLabel = "float"

    @property
    def weight_format(self) -> AffineFormat:
        return AffineFormat(self.bits, 0 if self.group == "tensor" else self.group, self.symmetric)

    @property
    def per_tensor(self) -> bool:
        return self.group == "tensor"

    @property
    def activation(self) -> Activation:
        return Activation.parse(self.activations)

    @property
    def label(self) -> str:
        return f"{self.weight_format.label}/{self.activations}"


SchemeOrFloat = Scheme | Literal["float"]


@dataclass(frozen=True, config=_STRICT)
class Select:
    """Which sites: all conditions that are given must hold.

    Attributes:
        name: glob on the module path, e.g. `*.mlp.down_proj`.
        role: `attn.q`, `attn.k`, `attn.v`, `attn.qkv`, `attn.o`, `mlp.gate`, `mlp.up`, `mlp.gate_up`, `mlp.down`, `embed`,
            `head`, `router`, `expert`; a glob (`attn.*`). Sites of unknown role never match a role.
        min_size, max_size: bounds on the number of weights.
    """

    name: str | None = None
    role: str | None = None
    min_size: int | None = None
    max_size: int | None = None

    def __str__(self) -> str:
        """`name: *.down_proj, max_size: 100`: what is asked for."""
        given = {key: getattr(self, key) for key in ("name", "role", "min_size", "max_size")}
        return ", ".join(f"{key}: {value}" for key, value in given.items() if value is not None) or "all"

    def matches(self, name: str, role: str | None, size: int) -> bool:
        return (
            (self.name is None or fnmatchcase(name, self.name))
            and (self.role is None or (role is not None and fnmatchcase(role, self.role)))
            and (self.min_size is None or size >= self.min_size)
            and (self.max_size is None or size <= self.max_size)
        )


@dataclass(frozen=True, config=_STRICT)
class Override:
    """Another scheme for the sites that `select` names; the last matching override wins."""

    select: Select
    scheme: SchemeOrFloat


@dataclass(frozen=True, config=_STRICT)
class Allow:
    """What may go wrong without failing the run; everything else that goes wrong does.

    Attributes:
        unmatched: names of passes that may match nothing.
        fallbacks: how many places may fall back to a weaker method than the one asked for.
        min_coverage: least share of the bytes of all constant matmul weights that must be quantized.
    """

    unmatched: tuple[str, ...] = ()
    fallbacks: int = 0
    min_coverage: float = 0.95


@dataclass(frozen=True, config=_STRICT)
class Calibration:
    """Which text the calibrated passes and the layers' output errors see; a call may ask for other numbers.

    Attributes:
        samples: windows; None means as many as the caller's default.
        length: tokens a window; None means the model's own window, 256 at most.
        seed: which windows of the text.
    """

    samples: int | None = None
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("length", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")


def _one_pass(value: Any) -> Any:
    """`round_to_nearest` or `{round_to_nearest: {clipping: mse}}` -> the pass object."""
    from qcompiler.passes import RECIPE_PASSES, Pass
    from qcompiler.recipe.errors import unknown_key

    if isinstance(value, Pass):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(
            f"a pass is its name, or its name with its options, e.g. 'round_to_nearest: {{clipping: mse}}'; found {value!r}"
        )
    (name, options), *_ = value.items()
    if name not in RECIPE_PASSES:
        raise ValueError(unknown_key("pass", name, RECIPE_PASSES))
    return RECIPE_PASSES[name].parse(options or {})


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Recipe:
    """How to compile a model.

    Attributes:
        linear: scheme of every linear site that nothing below names.
        embed: scheme of token embeddings (role `embed`) and of other row lookups.
        head: scheme of the output projection (role `head`). A pair tied to one storage shares one packed tensor; both
            schemes must then ask for the same weight format.
        overrides: in order, the last match wins.
        passes: what runs between analysis and rewriting, in order; the last one must solve every site.
        calibration: see `Calibration`.
        allow: see `Allow`.
        strict_groups: make a short last group an error.
    """

    name: str
    linear: SchemeOrFloat
    embed: SchemeOrFloat = Scheme(bits=8)
    head: SchemeOrFloat = Scheme(bits=8, activations="int8-token")
    overrides: tuple[Override, ...] = ()
    passes: tuple[Annotated[Any, BeforeValidator(_one_pass)], ...] = Field(
        default=("round_to_nearest",), validate_default=True
    )
    calibration: Calibration = Calibration()
    allow: Allow = Allow()
    strict_groups: bool = False
    description: str = ""

    def scheme(self, name: str, kind: str, role: str | None, size: int) -> SchemeOrFloat:
        """The scheme of a site: `Scheme` or `"float"`."""
        chosen = self.embed if kind == "embedding" else self.head if role == "head" else self.linear
        for override in self.overrides:
            if override.select.matches(name, role, size):
                chosen = override.scheme
        return chosen
