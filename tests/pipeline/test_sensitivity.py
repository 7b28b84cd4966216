"""Layers ranked by KL divergence: against a plain forward pass with the same weights, and what is made of the ranking."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qcompiler.capture.checkpoint import load
from qcompiler.capture.prepare import prepare
from qcompiler.capture.prepared import FixedLength
from qcompiler.cli import main
from qcompiler.errors import GateError, UnsupportedError, UsageError
from qcompiler.evaluate import calibration_batches
from qcompiler.evaluate.metrics import Mean, token_divergence
from qcompiler.graph.graph import Graph
from qcompiler.graph.partial import PartialRun
from qcompiler.numerics import affine
from qcompiler.ops.formats import AffineFormat
from qcompiler.recipe import load as load_recipe
from qcompiler.recipe import parse
from qcompiler.recipe.keep import keep_recipe
from qcompiler.report.progress import Silent
from qcompiler.report.sensitivity import sensitivity_document
from qcompiler.sensitivity import _float_logits, sensitivity
from tests.checkpoints import tiny_decoder, tiny_encoder, write
from tests.report.test_reports import plain
from tests.sweep.other_device import NAME, OtherDevice

SAMPLES, LENGTH = 3, 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> dict[str, Any]:
    return sensitivity(checkpoint, samples=SAMPLES, length=LENGTH, keep=2)


def by_forward_pass(checkpoint: Path, name: str, bits: int, group: int) -> tuple[float, float | None]:
    """The same divergence by the model itself, once with its weight and once with the rounded one."""
    model = load(checkpoint).model
    weight = model.get_submodule(name).weight
    own = weight.detach().clone()
    windows = [torch.from_numpy(w)[None] for w in calibration_batches(checkpoint, samples=SAMPLES, length=LENGTH)]
    mean = Mean()
    with torch.no_grad():
        for window in windows:
            weight.data = own
            expected = model(window).logits[0].numpy()
            weight.data = affine.fit(own, AffineFormat(bits, group), "mse").dequantize()
            mean.add(token_divergence(expected, model(window).logits[0].numpy())[0])
    return mean.mean, mean.se


@pytest.mark.parametrize(
    ("name", "bits"), [("model.layers.0.self_attn.q_proj", 2), ("model.layers.1.mlp.down_proj", 4), ("lm_head", 3)]
)
def test_as_by_a_whole_forward_pass(checkpoint: Path, found: dict[str, Any], name: str, bits: int) -> None:
    layer = next(layer for layer in found["layers"] if layer["name"] == name)
    mean, se = by_forward_pass(checkpoint, name, bits, 32)
    assert mean > 1e-4
    assert layer["kld"][str(bits)]["mean"] == pytest.approx(mean, rel=1e-3)
    assert layer["kld"][str(bits)]["se"] == pytest.approx(se, rel=1e-2)


def test_every_layer_is_ranked_at_every_width(found: dict[str, Any]) -> None:
    names = [layer["name"] for layer in found["layers"]]
    assert len(names) == 15 and names[0] == "model.layers.0.self_attn.q_proj" and names[-1] == "lm_head"
    assert found["bits"] == [8, 4, 3, 2] and list(found["ranking"]) == ["8", "4", "3", "2"]
    kld = {layer["name"]: {b: value["mean"] for b, value in layer["kld"].items()} for layer in found["layers"]}
    for bits, ranking in found["ranking"].items():
        assert sorted(ranking) == sorted(names)
        assert all(kld[a][bits] >= kld[b][bits] for a, b in itertools.pairwise(ranking))
    for name in names:
        assert 0 < kld[name]["8"] < kld[name]["4"] < kld[name]["3"] < kld[name]["2"], name
    down = next(layer for layer in found["layers"] if layer["name"] == "model.layers.0.mlp.down_proj")
    assert (down["role"], down["shape"], down["weights"], down["tied"]) == ("mlp.down", [64, 128], 8192, [])
    assert (found["samples"], found["length"], found["tokens"]) == (SAMPLES, LENGTH, SAMPLES * LENGTH)
    json.dumps(found, allow_nan=False)


def test_the_recipe_keeps_the_most_sensitive_layers(found: dict[str, Any]) -> None:
    recipe = parse(found["recipe"], "kept")
    # the head has 8 bits in the base and is no candidate
    expected = [name for name in found["ranking"]["4"] if name != "lm_head"][:2]
    assert recipe.name == "int4-keep2"
    for layer in found["layers"]:
        scheme = recipe.scheme(layer["name"], "linear", layer["role"], layer["weights"])
        base = load_recipe("int4").scheme(layer["name"], "linear", layer["role"], layer["weights"])
        assert scheme.bits == (8 if layer["name"] in expected else base.bits), layer["name"]
        assert (scheme.group, scheme.activations) == (base.group, base.activations)


def made_up(**divergence: float) -> list[dict[str, Any]]:
    return [
        {"name": name, "role": None, "shape": [32, 32], "weights": 1024, "tied": [], "kld": {"4": {"mean": value, "se": None}}}
        for name, value in divergence.items()
    ]


def test_keep_recipe() -> None:
    override = {"select": {"name": "c"}, "scheme": "float"}
    base = parse({"name": "b", "linear": {"bits": 4, "group": 32}, "overrides": [override]}, "b")
    layers = made_up(a=0.1, b=0.3, c=0.9, d=0.2)
    layers[1]["tied"] = ["embed"]
    layers[3]["name"] = "d[0]*"
    kept = keep_recipe(base, layers, 2)
    bits = {n: getattr(kept.scheme(n, "linear", None, 1024), "bits", "float") for n in ("a", "b", "c", "d[0]*", "d0x", "embed")}
    assert bits == {"a": 4, "b": 8, "c": "float", "d[0]*": 8, "d0x": 4, "embed": 8}
    with pytest.raises(UsageError, match="keep is 4, but recipe b gives 3 of 4 layers fewer than 8 bits"):
        keep_recipe(base, layers, 4)
    with pytest.raises(UsageError, match="gives layers 3 bits, which are not among the measured 4"):
        keep_recipe(parse({"name": "b", "linear": {"bits": 3}}, "b"), layers, 1)
    with pytest.raises(UsageError, match="keep_bits is 5"):
        keep_recipe(base, layers, 1, bits=5)


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"bits": (8, 5)}, "bits are 8, 5"),
        ({"bits": ()}, "bits are none"),
        ({"group": 16}, "group is 16"),
        ({"samples": 0}, "samples is 0"),
        ({"length": 1000, "bits": (4,)}, "the model takes at most 256 tokens"),
        ({"threads": 0}, "threads is 0"),
        ({"keep": 15}, "recipe int4 gives 14 of 15 layers fewer than 8 bits"),
        ({"base": "int5", "keep": 1}, "int5"),
    ):
        with pytest.raises(UsageError, match=message):
            sensitivity(checkpoint, **options)
    with pytest.raises(UnsupportedError, match="does not predict the next token"):
        sensitivity(tiny_encoder(tmp_path / "encoder"))


class Logarithm(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


@pytest.mark.parametrize("value", [-1.0, torch.inf])
def test_predictions_that_are_not_finite(value: float) -> None:
    x = torch.ones(1, 2, 3)
    run = PartialRun(Graph(torch.export.export(Logarithm(), (x,)).module(check_guards=False), "decoder", {"x": x}))
    envs = [run.begin({"x": x}), run.begin({"x": x * value})]
    with tempfile.TemporaryFile() as file, pytest.raises(GateError, match="logits are not finite in window 1"):
        _float_logits(run, envs, file, Silent())


def test_a_tied_head_names_what_else_reads_its_weight(tmp_path: Path) -> None:
    found = sensitivity(tiny_decoder(tmp_path / "tied", tied=True), bits=[4], samples=1, length=8, base="int4-weights", keep=1)
    head = found["layers"][-1]
    assert (head["name"], head["tied"]) == ("lm_head", ["model.embed_tokens"])
    assert head["kld"]["4"]["se"] is None and head["kld"]["4"]["mean"] > 0


@pytest.mark.slow
def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """One layer each for all experts' matrices; by the model itself with every matrix rounded."""
    config = transformers.MixtralConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = write(transformers.MixtralForCausalLM(config), tmp_path / "mixture")
    found = sensitivity(folder, bits=[2], samples=SAMPLES, length=LENGTH)
    layer = next(layer for layer in found["layers"] if layer["name"].endswith("down_proj"))
    assert layer["role"] == "expert" and len(layer["shape"]) == 3
    model = load(folder).model
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert list(weight.shape) == layer["shape"]
    own, mean = weight.detach().clone(), Mean()
    with torch.no_grad():
        for window in calibration_batches(folder, samples=SAMPLES, length=LENGTH):
            tokens = torch.from_numpy(window)[None]
            weight.data = own
            expected = model(tokens).logits[0].numpy()
            weight.data = torch.stack([affine.fit(w, AffineFormat(2, 32), "mse").dequantize() for w in own])
            mean.add(token_divergence(expected, model(tokens).logits[0].numpy())[0])
    assert layer["kld"]["2"]["mean"] == pytest.approx(mean.mean, rel=1e-3)


class Writes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        z = y.view(-1)
        y.add_(1)
        return z.sum() + y.sum(), x


def test_branches_of_a_graph_that_writes_in_place() -> None:
    """Running the rest twice gives the same twice, views of what is written among what is alive."""
    x = torch.arange(6.0).reshape(2, 3)
    module = torch.export.export(Writes(), (x,)).module(check_guards=False)
    run = PartialRun(Graph(module, "module", {"x": x}))
    assert any("add_" in str(node.target) for node in run.nodes)
    start = next(i for i, node in enumerate(run.nodes) if "add_" in str(node.target))
    env = run.begin({"x": x})
    run.run(env, 0, start)
    results = []
    for _ in range(2):
        branch = run.branch(env)
        run.run(branch, start, None)
        results.append(branch[run.output].item())
    expected = 2 * (2 * x + 1).sum().item()
    assert results == [expected, expected]


def test_table() -> None:
    layers = made_up(small=1e-5, large=0.25)
    layers[0]["role"] = "mlp.up"
    result = {
        "model": "tiny", "text": "a text", "samples": 2, "length": 8, "bits": [4], "group": 0, "layers": layers,
        "ranking": {"4": ["large", "small"]}, "seconds": 61.0, "recipe": {"name": "int4-keep1"},
    }  # fmt: skip
    assert plain(sensitivity_document(result, saved="kept.yaml")) == (
        "tiny: 2 layers, 2 windows of 8 tokens, 1m01s\n"
        "text  a text\n"
        "KL(float ‖ only that layer rounded, one scale a row) in nats a token; ordered by 4 bits\n"
        "\n"
        "rank  layer  role    shape  weights  KLD 4 bits  ± se\n"
        "   1  large  -       32×32    1,024    2.50e-01     -\n"
        "   2  small  mlp.up  32×32    1,024    1.00e-05     -\n"
        "\n"
        "recipe int4-keep1: kept.yaml\n"
    )


def test_on_another_device_it_is_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, weights and rounding are moved there; the same numbers to the bit."""
    monkeypatch.setattr("qcompiler.sensitivity.find_device", lambda name, kernels: None)
    few: dict[str, Any] = {"bits": (4,), "samples": 2, "length": 8}
    with OtherDevice() as mode:
        there = sensitivity(checkpoint, device=NAME, **few)
    here = sensitivity(checkpoint, **few)
    assert there["layers"] == here["layers"] and there["ranking"] == here["ranking"]
    assert mode.ops["aten.linear.default"] > 10


def test_what_a_recipe_allows_of_the_graph_holds_for_the_measured_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def seen(model: Any, **given: Any) -> Any:
        asked.append(given)
        prepared = prepare(model, **given)
        prepared.fixed = FixedLength(6, 0, {}, True)
        return prepared

    monkeypatch.setattr("qcompiler.capture.prepare.prepare", seen)
    recipe = {"name": "one length", "linear": {"bits": 8}, "allow": {"fixed_length": 6}}
    assert sensitivity(checkpoint, bits=(8,), samples=1, base=recipe)["length"] == 6
    assert asked == [{"text_only": False, "fixed_length": 6}]
    with pytest.raises(UsageError, match="length is 8, but the graph takes 6 tokens"):
        sensitivity(checkpoint, bits=(8,), samples=1, length=8, base=recipe)


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kept.yaml"
    arguments = ["sensitivity", str(checkpoint), "--bits", "4,8", "--samples", "1", "--length", "8", "--json", "--quiet"]
    assert main([*arguments, "--save-recipe", str(file), "--keep", "1", "--recipe", "int4-weights"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert err == "" and (data["schema"], data["report"], data["ordered_by"]) == (1, "sensitivity", 4)
    assert data["bits"] == [8, 4] and data["saved_recipe"] == str(file)
    recipe = load_recipe(file)
    assert recipe.name == "int4-weights-keep1" and len(recipe.overrides) == 1
    np.testing.assert_equal([o.scheme.bits for o in recipe.overrides], [8])
    for more, code, message in (
        (["--save-recipe", str(file), "--keep", "1"], 3, "is there already"),
        (["--save-recipe", str(tmp_path / "no" / "x.yaml"), "--keep", "1"], 3, "there is no directory"),
        (["--keep", "1"], 2, "belong together"),
        (["--keep-bits", "8"], 2, "give --save-recipe"),
        (["--by", "2"], 2, "not among the measured widths"),
        (["--bits", "x"], 2, "invalid list of widths"),
        (["--text", str(tmp_path / "no.txt")], 3, "no such file"),
    ):
        assert main([*arguments, *more]) == code
        assert message in capsys.readouterr().err
