from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.errors import GateError
from qcompiler.graph.graph import Graph
from qcompiler.graph.verify import STAGES, verify
from tests.captures import ANALYSE, NORMALISE, run

aten = torch.ops.aten


def analysed_graph() -> Graph:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    graph = capture(module, torch.randn(3, 8))
    run(graph, NORMALISE + ANALYSE)
    return graph


def linear_node(graph: Graph) -> torch.fx.Node:
    return next(node for node in graph.nodes if node.target is aten.linear.default)


def refused(graph: Graph, stage: str, *words: str) -> None:
    with pytest.raises(GateError) as caught:
        verify(graph, stage)
    assert all(word in str(caught.value) for word in (repr(stage), *words)), str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_sound_graph_passes_every_stage(stage: str) -> None:
    verify(analysed_graph(), stage)


def test_an_unknown_stage_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="unknown stage 'solved'"):
        verify(analysed_graph(), "solved")


def test_an_assertion_must_be_stripped() -> None:
    graph = analysed_graph()
    node = linear_node(graph)
    with graph.module.graph.inserting_after(node):
        graph.module.graph.call_function(aten._assert_tensor_metadata.default, (node,))
    verify(graph, "captured")
    refused(graph, "normalised", "assertions must be stripped")


def test_guards_must_be_stripped() -> None:
    graph = analysed_graph()
    graph.module.add_module("_guards_fn", nn.Identity())
    with graph.module.graph.inserting_before(linear_node(graph)):
        graph.module.graph.call_module("_guards_fn")
    verify(graph, "captured")
    refused(graph, "normalised", "_guards_fn", "guards must be stripped")


def test_a_module_call_is_refused() -> None:
    graph = analysed_graph()
    graph.module.add_module("other", nn.Identity())
    with graph.module.graph.inserting_before(linear_node(graph)):
        graph.module.graph.call_module("other")
    refused(graph, "captured", "other", "module calls are not allowed")


def test_fake_quantization_is_refused_everywhere() -> None:
    graph = analysed_graph()
    node = linear_node(graph)
    with graph.module.graph.inserting_after(node):
        graph.module.graph.call_function(aten.fake_quantize_per_tensor_affine.default, (node, 1.0, 0, -8, 7))
    for stage in STAGES:
        refused(graph, stage, "fake quantization")


def test_a_constant_must_exist_and_be_what_the_graph_says() -> None:
    graph = analysed_graph()
    del graph.module.get_submodule("0").weight
    # An operator's own lint may see it first; either way the node is named.
    with pytest.raises(GateError, match="weight"):
        verify(graph, "normalised")
    graph = analysed_graph()
    graph.module.get_submodule("0").weight = nn.Parameter(torch.randn(16, 4))
    refused(graph, "normalised", "[16, 4]", "[16, 8]")


def test_shapes_of_a_linear_must_agree() -> None:
    graph = analysed_graph()
    node = linear_node(graph)
    node.meta["val"] = node.meta["val"][:, :5]
    refused(graph, "normalised", node.name, "result ends in 5", "[16, 8]")


def test_a_site_must_be_in_the_graph_and_describe_it() -> None:
    graph = analysed_graph()
    graph.sites[0].shape = (8, 16)
    refused(graph, "analysed", graph.sites[0].name, "the weight is [16, 8], the site says [8, 16]")
    graph = analysed_graph()
    graph.sites[1].name = graph.sites[0].name
    refused(graph, "analysed", "two sites have this name")
    graph = analysed_graph()
    node = graph.sites[1].node
    node.replace_all_uses_with(node.args[0])
    graph.module.graph.erase_node(node)
    refused(graph, "analysed", graph.sites[1].name, "not in the graph")


def test_a_tie_group_must_share_one_storage() -> None:
    graph = analysed_graph()
    for site in graph.sites:
        site.tie_group = 0
    refused(graph, "analysed", "tie group 0 does not share one storage")


def test_our_ops_come_with_the_rewrite() -> None:
    with torch.library._scoped_library("qcompiler", "FRAGMENT") as library:
        library.define("verify_probe(Tensor x) -> Tensor")
        graph = analysed_graph()
        node = linear_node(graph)
        with graph.module.graph.inserting_after(node):
            graph.module.graph.call_function(torch.ops.qcompiler.verify_probe.default, (node,))
        refused(graph, "analysed", "verify_probe", "'rewritten' only")
        verify(graph, "rewritten")
