"""What a recipe is: frozen dataclasses, built from YAML or in Python, one vocabulary, parsed by pydantic.

A recipe says which format every site gets (`linear`, `embed`, `head`, `overrides`), which passes run between analysis and
rewriting (`passes`, in order), and what is allowed to go wrong (`allow`). Normalisation, analysis and rewriting are always
there and are not written down.
"""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from qcompiler.ops.formats import Activation, AffineFormat, VqFormat

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


# Vector-quantized formats by name (docs/layout.md gives their bits per weight).
VQ_FORMATS = {
    "vq2": "vq2d16-b16x128-g128",
    "vq2.5": "vq2d32-b16x256-g128",
    "vq3": "vq2d64-b32x256-g128",
    "vq4": "vq2d256-b128x256-g128",
    "vq2-4d": "vq4d256-b128x256-row",
    "vq1d-2": "vq1d4-b16x128-g128",
    "vq1d-3": "vq1d8-b16x256-g128",
    "vq1d-4": "vq1d16-b16x256-g128",
    "nf4": "vq1d16-ballxall-g64",
    "fp4": "vq1d16-ballxall-g64",
}
FIXED_TABLES = ("nf4", "fp4")


@dataclass(frozen=True, config=_STRICT)
class VqScheme:
    """The format of a weight whose vectors are entries of small codebooks, and of the activations that meet it.

    Attributes:
        vq: a name (`vq2`, `vq2.5`, `vq3`, `vq4`, `vq2-4d`, `vq1d-2`, `vq1d-3`, `vq1d-4`, `nf4`, `fp4`) or the label of a
            format, e.g. `vq2d64-b32x256-g128`. The last two have a fixed table, all others learned codebooks.
        table: 16 levels in ascending order, in place of learned ones, for a format of one dimension and one codebook.
        activations: `float` or `int8-block128` (one scale per 128 inputs).
        instead: format of a matrix that is too small for a codebook, and of experts; each is counted as a fallback.
            By default 4 bits in groups of 32 with the same activations.
    """

    vq: str
    table: tuple[float, ...] | None = None
    activations: Literal["float", "int8-block128"] = "float"
    instead: Scheme | None = None

    def __post_init__(self) -> None:
        if self.vq not in VQ_FORMATS and not re.fullmatch(r"vq\d+d\d+-.*", self.vq):
            known = ", ".join(VQ_FORMATS)
            raise ValueError(f"unknown vq format {self.vq!r}; known: {known}, or a label as 'vq2d64-b32x256-g128'")
        format = self.weight_format
        if self.table is None:
            return
        if self.vq in FIXED_TABLES:
            raise ValueError(f"{self.vq} has a table of its own; give the format's label to use another")
        if format.dim != 1 or format.block_rows or format.block_columns or len(self.table) != format.centroids:
            raise ValueError(
                f"a table of {len(self.table)} levels needs a format of one dimension with as many centroids in one codebook, "
                f"e.g. vq1d16-ballxall-g64; found {format.label}"
            )
        if not all(map(math.isfinite, self.table)) or list(self.table) != sorted(set(self.table)):
            raise ValueError("the table's levels must be finite, ascending, each once")

    @property
    def weight_format(self) -> VqFormat:
        return VqFormat.parse(VQ_FORMATS.get(self.vq, self.vq))

    @property
    def fixed(self) -> str | tuple[float, ...] | None:
        """The table that is not learned: its name or its levels."""
        return self.vq if self.vq in FIXED_TABLES else self.table

    @property
    def per_tensor(self) -> bool:
        return False

    @property
    def activation(self) -> Activation:
        return Activation.parse(self.activations)

    @property
    def fallback(self) -> Scheme:
        """What a matrix gets that this format does not take."""
        return self.instead or Scheme(bits=4, group=32, activations=self.activations)

    @property
    def label(self) -> str:
        table = "" if self.fixed is None else f"-{self.fixed if isinstance(self.fixed, str) else 'table'}"
        return f"{self.weight_format.label}{table}/{self.activations}"


AnyScheme = Scheme | VqScheme


def _kind_of_scheme(value: Any) -> str:
    """Which of the schemes a value is meant to be: errors then speak of that one alone."""
    if isinstance(value, dict):
        return "VqScheme" if "vq" in value else "Scheme"
    return type(value).__name__ if isinstance(value, AnyScheme) else "float"


SchemeOrFloat = Annotated[
    Annotated[Scheme, Tag("Scheme")] | Annotated[VqScheme, Tag("VqScheme")] | Annotated[Literal["float"], Tag("float")],
    Discriminator(_kind_of_scheme),
]


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
        text_only: of a model that takes more than text, compile the text path alone.
        fixed_length: of a model whose own code holds the length of a text, compile a graph of so many tokens; true: as many
            as the model's context has.
    """

    unmatched: tuple[str, ...] = ()
    fallbacks: int = 0
    min_coverage: float = 0.95
    text_only: bool = False
    fixed_length: bool | int = False

    def __post_init__(self) -> None:
        if self.fixed_length is not False and self.fixed_length < 2 and self.fixed_length is not True:
            raise ValueError(f"fixed_length is {self.fixed_length}, expected at least 2 tokens")


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
        fuse: one op for layers that read the same value, where the target has such ops; the numbers are the same.
        own_attention: attention over a cache by our op, where the target has it, else by the runtime's: the same but for the
            last bits, which our op gives alike in every runtime.
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
    fuse: bool = True
    own_attention: bool = True
    description: str = ""

    def scheme(self, name: str, kind: str, role: str | None, size: int) -> SchemeOrFloat:
        """The scheme of a site: `Scheme`, `VqScheme` or `"float"`."""
        chosen = self.embed if kind == "embedding" else self.head if role == "head" else self.linear
        for override in self.overrides:
            if override.select.matches(name, role, size):
                chosen = override.scheme
        return chosen
