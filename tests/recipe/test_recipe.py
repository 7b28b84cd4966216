"""Recipes: built-in ones parse and round-trip, mistakes are named with what was probably meant."""

from __future__ import annotations

import pytest
import yaml

from qcompiler import recipe as recipes
from qcompiler.errors import InputError, UsageError
from qcompiler.passes import RoundToNearest
from qcompiler.recipe import Override, Recipe, Scheme, Select


@pytest.mark.parametrize("name", recipes.builtin_names())
def test_builtin_recipes_round_trip(name):
    recipe = recipes.load(name)
    assert recipe.name == name and recipe.description
    assert recipes.parse(yaml.safe_load(recipes.to_yaml(recipe)), name) == recipe


def test_the_issue_s_recipes_exist():
    assert {"int8", "int8-weights", "int4", "int4-g128", "int4-asym", "int3", "int2"} <= set(recipes.builtin_names())
    default = recipes.load("int4")
    assert default.linear == Scheme(bits=4, group=32, activations="int8-block128")
    assert default.head == Scheme(bits=8, activations="int8-token") and default.embed == Scheme(bits=8)


def test_python_and_yaml_are_one_vocabulary():
    text = """
    name: mine
    linear: {bits: 4, group: 128, symmetric: false, activations: float}
    overrides:
      - select: {name: '*.down_proj'}
        scheme: {bits: 8}
      - select: {role: router}
        scheme: float
    passes: [{round_to_nearest: {clipping: minmax}}]
    """
    python = Recipe(
        name="mine",
        linear=Scheme(bits=4, group=128, symmetric=False, activations="float"),
        overrides=(Override(Select(name="*.down_proj"), Scheme(bits=8)), Override(Select(role="router"), "float")),
        passes=(RoundToNearest(clipping="minmax"),),
    )
    assert recipes.parse(yaml.safe_load(text), "mine") == python


def test_the_last_matching_override_wins():
    recipe = Recipe(
        name="x",
        linear=Scheme(bits=4),
        overrides=(
            Override(Select(role="attn.*"), Scheme(bits=8)),
            Override(Select(name="a.*", max_size=10), Scheme(bits=2)),
        ),
    )
    assert recipe.scheme("b", "linear", "attn.q", 100).bits == 8
    assert recipe.scheme("a.q", "linear", "attn.q", 10).bits == 2
    assert recipe.scheme("a.q", "linear", None, 11).bits == 4
    assert recipe.scheme("a.q", "linear", "head", 11).bits == 8


MISTAKES = {
    "name: x\nlinear: {bitss: 4}": r"linear\.bitss: unknown key 'bitss'; did you mean 'bits'\?",
    "name: x\nlinaer: {bits: 4}": r"unknown key 'linaer'; did you mean 'linear'\?",
    "name: x\nlinear: {bits: 5}": r"linear\.bits: Input should be 8, 4, 3 or 2; found 5",
    "linear: {bits: 4}": "name: required key is missing",
    "name: x\nlinear: {bits: 4}\npasses: [round_to_nearst]": r"unknown pass 'round_to_nearst'; did you mean 'round_to_nearest'\?",
    "name: x\nlinear: {bits: 4}\npasses: [{round_to_nearest: {cliping: mse}}]": (
        r"unknown option 'cliping'; did you mean 'clipping'\?"
    ),
    "name: x\nlinear: {bits: 4}\npasses: [{round_to_nearest: {clipping: best}}]": (
        "clipping: Input should be 'mse' or 'minmax'; found 'best'"
    ),
    "name: x\nlinear: {bits: 4}\noverrides: [{select: {rule: a}, scheme: float}]": r"unknown key 'rule'; did you mean 'role'\?",
    "[1, 2]": "expected a mapping, found list",
}


@pytest.mark.parametrize("text,message", MISTAKES.items())
def test_mistakes_are_named(text, message):
    with pytest.raises(UsageError, match=message):
        recipes.parse(yaml.safe_load(text), "mine")


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UsageError, match=r"unknown recipe 'int44'; did you mean 'int4'\?"):
        recipes.load("int44")
    with pytest.raises(InputError, match="missing.yaml: cannot be read"):
        recipes.load(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        recipes.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"distill_blocks": {"steps": 0}}, "distill_blocks: steps is 0, expected at least 1"),
        ({"distill_blocks": {"join": 0}}, "distill_blocks: join is 0, expected at least 1"),
        ({"distill_blocks": {"rate": -1}}, "distill_blocks: rate is -1.0, expected a step of 0 or more"),
        ({"distill_blocks": {"hold_out": 1}}, "distill_blocks: hold_out is 1.0, expected a share between 0 and 1"),
        ({"round_to_nearest": {"norm": 0}}, "round_to_nearest: norm is 0.0, expected an exponent above 0"),
        ({"gptq": {"damping": -1}}, "gptq: damping is -1 and floor 1e-06, expected shares of the mean, 0 to 1"),
        ({"gptq": {"select": {"nam": "x"}}}, "gptq: unknown option 'select.nam'"),
    ],
)
def test_options_of_passes_are_checked_when_the_recipe_is_read(step, message):
    with pytest.raises(UsageError) as refused:
        recipes.parse({"name": "x", "linear": {"bits": 4}, "passes": [step]}, "mine")
    assert str(refused.value) == f"recipe mine: passes.0: {message}"


@pytest.mark.parametrize(("key", "least"), [("samples", 0), ("length", 1), ("seed", 0)])
def test_calibration_is_checked_when_the_recipe_is_read(key, least):
    recipe = {"name": "x", "linear": {"bits": 4}}
    recipes.parse(recipe | {"calibration": {key: least}}, "mine")
    with pytest.raises(UsageError, match=f"recipe mine: calibration: {key} is {least - 1}, expected at least {least}$"):
        recipes.parse(recipe | {"calibration": {key: least - 1}}, "mine")


@pytest.mark.parametrize("name", recipes.builtin_names())
def test_builtin_recipes_leave_the_window_to_the_model(name):
    """A fixed one would be more than some models take."""
    assert recipes.load(name).calibration.length is None
