"""What a pass is, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context


@dataclass(frozen=True)
class Skip:
    """A place that the pass looked at and left alone, and why."""

    node: str
    reason: str


@dataclass
class Report:
    """What a pass did.

    Attributes:
        matched: places that the pass's pattern fits.
        changed: places that it rewrote (or annotated, for an analysis).
        skipped: near misses and refusals, each with its reason.
        fallbacks: places where the asked-for method was replaced by a weaker one; they fail the run unless allowed.
        layers: per site, what is new about it: `{name: {"format": ..., "bytes": ..., "weight_sqnr_db": ...}}`.
        notes: free facts, JSON-able, for the record.
    """

    matched: int = 0
    changed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    fallbacks: list[Skip] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A rewrite or an analysis of the graph. Subclasses are frozen dataclasses whose fields are the recipe's keys.

    Class attributes:
        name: snake_case, unique; what `inspect --pass` and `diff --passes` take.
        stage: `normalise`, `analyse`, `transform`, `observe`, `solve` or `rewrite`.
        required: True when matching nothing is an error unless the recipe allows it.
    """

    name: ClassVar[str] = "pass"
    stage: ClassVar[str] = "normalise"
    required: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> Report:
        raise NotImplementedError(f"{type(self).__name__}.run")

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Pass:
        """The pass with these fields, checked by pydantic.

        Raises:
            ValueError: an unknown or ill-typed field, named.
        """
        from pydantic import TypeAdapter, ValidationError

        from qcompiler.recipe.errors import unknown_key

        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(f"{cls.name}: {unknown_key('option', key, known)}")
        try:
            return TypeAdapter(cls).validate_python(options)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":  # the pass itself said what it expected and found
                raise ValueError(f"{cls.name}: {first['msg'].removeprefix('Value error, ')}") from error
            place = ".".join(map(str, first["loc"]))
            if first["type"] == "unexpected_keyword_argument":
                raise ValueError(f"{cls.name}: unknown option {place!r}") from error
            raise ValueError(f"{cls.name}: {place}: {first['msg']}; found {first['input']!r}") from error
