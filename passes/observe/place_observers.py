"""Mark the values whose range must be known before the model runs.

q(x), k(x), v(x)  ─▶  o = observe(x); q(o), k(o), v(o)     where their activations are int8-static
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qcompiler.ops.formats import Activation
from qcompiler.ops.observe import OBSERVE
from qcompiler.passes.analyse.find_groups import input_value
from qcompiler.pipeline.passes import Pass, Report, Skip

if TYPE_CHECKING:
    from torch.fx import Node

    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


@dataclass(frozen=True)
class PlaceObservers(Pass):
    """One observer a value, whatever number of sites read it; the value's other readers go on reading the value itself."""

    name: ClassVar[str] = "place_observers"
    stage: ClassVar[str] = "observe"
    required: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        readers: dict[Node, list[Site]] = {}
        for site in graph.sites:
            scheme = context.schemes.get(site.name)
            if site.kind == "embedding":
                continue  # a lookup has no activations
            if scheme is None:
                report.skipped.append(Skip(site.name, context.left_in_float.get(site.name, "no format")))
            elif scheme.activation is not Activation.INT8_STATIC:
                report.skipped.append(Skip(site.name, f"its activations are {scheme.activations}, not int8-static"))
            elif site.name in context.static_ranges:
                report.skipped.append(Skip(site.name, "its range is known already"))
            elif site.kind != "linear":
                report.skipped.append(Skip(site.name, f"static activations of a site of kind {site.kind}"))
            else:
                readers.setdefault(input_value(site), []).append(site)
        for value, sites in readers.items():
            if value.target is OBSERVE:
                report.skipped += [Skip(site.name, "its input is observed already") for site in sites]
                continue
            self._place(graph, value, sites)
            report.matched += len(sites)
            report.changed += 1
        graph.module.recompile()
        report.notes["observers"] = report.changed
        return report

    @staticmethod
    def _place(graph: Graph, value: Node, sites: list[Site]) -> None:
        fx = graph.module.graph
        with fx.inserting_after(value):
            observer = fx.call_function(OBSERVE, (value, sites[0].name, Activation.INT8_STATIC.label))
        observer.meta = dict(value.meta)
        for node in {first_reader(site, value): None for site in sites}:
            node.replace_input_with(value, observer)


def first_reader(site: Site, value: Node) -> Node:
    """Of the nodes between a value and a site that only reshape it, the one that reads it; the site's own where there is
    none."""
    node = site.node
    while node.args[0] is not value:
        node = node.args[0]  # type: ignore[assignment]  # input_value went this way
    return node
