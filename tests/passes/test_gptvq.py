"""GPTVQ as a pass: every layer better on its inputs than with codebooks of the weight alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import InputError, UsageError
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import VqFormat
from qcompiler.passes.observe.guide import Guide
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.gptvq import Gptvq, whole_codebooks
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.passes.transform.awq import Awq
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Select, VqScheme
from tests.captures import analysed
from tests.sweep.prepared_context import context_of, linear_sites

QUICK = {"iterations": 10, "rounds": 1}
VQ2 = {"vq": "vq2d16-b16x128-g128", "activations": "int8-block128"}


def solved(linear: dict, *, samples: int = 24, model_type: str = "llama", **options):
    model = analysed(model_type)
    context = context_of(model, linear, samples=samples, length=16)
    return model, context, Gptvq(**QUICK | options).run(model.graph, context)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_layers_lose_less_than_with_codebooks_of_the_weight(model_type: str, asymmetric: bool):
    model, context, report = solved(VQ2, model_type=model_type, asymmetric=asymmetric)
    assert report.changed == report.matched == len(linear_sites(model)) and not report.fallbacks
    for name, layer in report.layers.items():
        assert layer["method"] == "gptvq" and layer["error_after"] < layer["error_before"], name
        assert isinstance(context.solutions[name], VqWeight)


def test_the_error_is_that_of_the_stored_weight():
    model, context, report = solved(VQ2, select=Select(name="*.0.self_attn.q_proj"))
    (name,) = report.layers
    weight = model.graph.constant(model.graph.site(name).weight)
    hessian = torch.zeros(weight.shape[1], weight.shape[1])
    from qcompiler.sweep import Sweep

    fresh = context_of(model, VQ2, samples=24, length=16)
    for segment in Sweep(model.graph, fresh, [model.graph.site(name)]):
        for wave in segment.waves:
            segment.feed({group.node: lambda x: hessian.addmm_(x.T, x) for group in wave.groups})
    difference = weight - context.solutions[name].dequantize()
    expected = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
    assert report.layers[name]["error_after"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("vq", ["nf4", "fp4"])
def test_a_fixed_table_is_kept(vq: str):
    model, context, report = solved({"vq": vq}, select=Select(name="*.0.self_attn.*"))
    books = {tuple(context.solutions[name].codebooks.flatten().tolist()) for name in report.layers}
    assert len(books) == 1 and len(set(*books)) >= 15  # FP4 has two zeros
    assert all(layer["error_after"] < layer["error_before"] for layer in report.layers.values())


def test_the_op_computes_what_the_solver_measured():
    model = analysed.__wrapped__("llama")  # its own: the graph is rewritten
    context = context_of(model, {"vq": "vq3"}, samples=4)
    Gptvq(**QUICK, select=Select(role="mlp.*")).run(model.graph, context)
    RoundToNearest().run(model.graph, context)
    report = QuantizeSites().run(model.graph, context)
    labels = {name: layer["format"] for name, layer in report.layers.items()}
    assert "vq2d64-b32x256-g128" in labels.values() and report.changed == len(labels)
    names = {str(node.target) for node in model.graph.module.graph.nodes if "qcompiler" in str(node.target)}
    assert any("linear_vq" in name for name in names)


def test_rounding_to_nearest_learns_codebooks_of_the_weight():
    model = analysed("llama")
    context = context_of(model, VQ2, samples=0)
    report = RoundToNearest().run(model.graph, context)
    vq = [name for name, scheme in context.schemes.items() if isinstance(scheme, VqScheme)]
    assert vq and all(isinstance(context.solutions[name], VqWeight) for name in vq)
    assert all(7 < report.layers[name]["weight_sqnr_db"] < 20 for name in vq)


def test_solvers_take_their_own_formats_and_say_so():
    model = analysed("llama")
    context = context_of(model, VQ2, samples=8, overrides=[{"select": {"role": "mlp.*"}, "scheme": {"bits": 4, "group": 64}}])
    report = Gptvq(**QUICK).run(model.graph, context)
    reasons = {skip.node: skip.reason for skip in report.skipped}
    assert reasons["model.layers.0.mlp.up_proj"] == "int4-g64-sym: not vector-quantized"
    report = Gptq().run(model.graph, context)
    assert set(report.layers) == {f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")}
    fresh = context_of(model, VQ2, samples=8)
    reasons = {skip.node: skip.reason for skip in Gptq().run(model.graph, fresh).skipped}
    assert "vq2d16-b16x128-g128: vector-quantized" in reasons.values()
    own = analysed.__wrapped__("llama")  # its own: what is left to fold is folded
    skipped = Awq().run(own.graph, context_of(own, VQ2, samples=8)).skipped
    assert "vector-quantized: the search rounds to integers" in " ".join(skip.reason for skip in skipped)


def test_guided_without_weights_of_tokens_is_refused():
    model = analysed("llama")
    with pytest.raises(UsageError, match="guided, but .* layers have no weights of their tokens .*; put the pass guide"):
        Gptvq(guided=True).run(model.graph, context_of(model, VQ2))
    with pytest.raises(ValueError, match="guided and asymmetric do not go together"):
        Gptvq(guided=True, asymmetric=True)


@pytest.mark.parametrize(
    ("label", "n", "parts"),
    [("vq2d16-b16x128-g128", 256, 4), ("vq4d256-b128x256-row", 256, 2), ("vq4d256-b128x256-row", 128, 1),
     ("vq1d8-ballxall-g64", 256, 1), ("vq2d16-b16x128-g128", 250, 1)],
)  # fmt: skip
def test_no_codebook_belongs_to_two_guided_parts(label: str, n: int, parts: int):
    hessians = torch.arange(4.0)[:, None, None].expand(4, 3, 3)
    merged = whole_codebooks(hessians, n, VqFormat.parse(label), fixed=False)
    assert merged[:, 0, 0].tolist() == {4: [0, 1, 2, 3], 2: [0.5, 2.5], 1: [1.5]}[parts]
    assert len(whole_codebooks(hessians, 256, VqFormat.parse(label), fixed=True)) == 4


def test_guided_layers_of_few_rows_are_solved():
    model = analysed("llama")
    context = context_of(model, {"vq": "vq4d256-b128x256-row"}, samples=6, length=16)
    chosen = Select(name="*.0.self_attn.*")
    Guide(select=chosen).run(model.graph, context)
    report = Gptvq(**QUICK, guided=True, select=chosen).run(model.graph, context)
    assert {layer["guided_parts"] for layer in report.layers.values()} <= {1, 2} and not report.fallbacks
    assert all(layer["error_after"] < layer["error_before"] for layer in report.layers.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"iterations": 0}, "iterations is 0"), ({"damping": 2.0}, "damping is 2"), ({"seeding": "random"}, "seeding is 'random'")],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Gptvq(**options)


def test_a_weight_that_is_no_number_is_named():
    model = analysed.__wrapped__("llama")  # its own: a weight is spoilt
    context = context_of(model, VQ2, samples=4)
    site = model.graph.site("model.layers.0.self_attn.q_proj")
    broken = model.graph.constant(site.weight).clone()
    broken[3, 5] = float("nan")
    model.graph.set_constant(site.weight, broken)
    with pytest.raises(InputError, match=r"layer model.layers.0.self_attn.q_proj: .*NaN"):
        Gptvq(**QUICK).run(model.graph, context)


def test_without_samples_it_says_what_it_needs():
    model = analysed("llama")
    with pytest.raises(UsageError, match="needs calibration samples"):
        Gptvq(**QUICK).run(model.graph, context_of(model, VQ2, samples=0))


def test_one_sample_is_enough_and_is_warned_of():
    model = analysed("llama")
    context = context_of(model, VQ2, samples=1, length=4)
    warnings: list[str] = []
    context.reporter.warning = warnings.append  # type: ignore[method-assign]
    report = Gptvq(**QUICK, select=Select(name="*.0.self_attn.q_proj")).run(model.graph, context)
    assert report.changed == 1 and "more inputs than they met calibration tokens" in warnings[0]


def test_a_trace_of_the_pass_is_a_record():
    model = analysed("llama")
    context = context_of(model, VQ2, samples=4, length=16)
    trace = Trace()
    PassManager(trace, verify_each=True).run(model.graph, context, [Gptvq(**QUICK)])
    assert trace.entries[-1].record["name"] == "gptvq" and len(trace.layers()) == len(linear_sites(model))
