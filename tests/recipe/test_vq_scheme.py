"""Vector-quantized schemes in recipes: names, labels, tables, what is refused, and what a matrix gets that is too small."""

from __future__ import annotations

import pytest

from qcompiler import recipe as recipes
from qcompiler.errors import GateError, UnsupportedError, UsageError
from qcompiler.lower.stock import check_recipe
from qcompiler.ops.formats import AffineFormat, VqFormat, parse_weight_format
from qcompiler.passes.analyse.assign_formats import AssignFormats
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import FIXED_TABLES, VQ_FORMATS, Scheme, VqScheme
from tests.captures import analysed
from tests.sweep.prepared_context import context_of

VQ2 = {"vq": "vq2", "activations": "int8-block128"}


def parsed(linear: object, **more: object) -> recipes.Recipe:
    return recipes.parse({"name": "r", "linear": linear, **more}, "r.yaml")


@pytest.mark.parametrize("name", VQ_FORMATS)
def test_every_name_is_a_format_whose_label_says_it_all(name: str):
    scheme = parsed({"vq": name}).linear
    assert isinstance(scheme, VqScheme) and scheme.weight_format == parse_weight_format(scheme.weight_format.label)
    assert scheme == VqScheme(vq=name) and (scheme.fixed == name) is (name in FIXED_TABLES)
    by_label = VqScheme(vq=VQ_FORMATS[name])
    assert by_label.weight_format == scheme.weight_format and by_label.fixed is None


def test_the_label_of_a_fixed_table_is_not_that_of_learned_levels():
    learned = VqScheme(vq="vq1d16-ballxall-g64")
    table = tuple(float(i) for i in range(16))
    own = VqScheme(vq="vq1d16-ballxall-g64", table=table)
    assert len({VqScheme(vq="nf4").label, VqScheme(vq="fp4").label, learned.label, own.label}) == 4
    assert own.fixed == table


def test_a_recipe_survives_the_way_to_yaml_and_back():
    recipe = parsed({**VQ2, "instead": {"bits": 8}}, overrides=[{"select": {"role": "mlp.down"}, "scheme": {"vq": "vq3"}}])
    assert recipes.parse(recipes.to_dict(recipe), "again") == recipe


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"vq": "vq9"}, r"unknown vq format 'vq9'; known: vq2, .* or a label as 'vq2d64-b32x256-g128'"),
        ({"vq": "vq3d64-b32x256-g128"}, "vectors of 3 columns have no packed form; known: 1, 2, 4"),
        ({"vq": "vq2d48-b32x256-g128"}, "48 centroids of 2 columns have no packed index; known: 16, 32, 64, 256"),
        ({"vq": "vq2d64-b8x256-g128"}, "a codebook's rows must be a multiple of 16, or 0 for all, got 8"),
        ({"vq": "vq2d64-b32x100-g128"}, "a codebook's columns must be a multiple of 128, or 0 for all, got 100"),
        ({"vq": "vq2d64-b32x256-g16"}, "group must be one of"),
        ({"vq": "vq2", "activations": "int8-token"}, "activations: Input should be 'float' or 'int8-block128'"),
        ({"vq": "vq2", "grup": 64}, "unknown key 'grup'. Known: activations, instead, table, vq"),
        ({"vq": "vq2", "instead": {"bits": 4, "grup": 64}}, "instead.grup: unknown key 'grup'; did you mean 'group'"),
        ({"vq": "vq2", "table": [0.0] * 16}, "a table of 16 levels needs a format of one dimension"),
        ({"vq": "nf4", "table": [0.0] * 16}, "nf4 has a table of its own"),
        ({"vq": "vq1d16-ballxall-g64", "table": [0.0] * 16}, "levels must be finite, ascending, each once"),
        ({"vq": "vq1d16-ballxall-g64", "table": [*range(15), float("nan")]}, "levels must be finite, ascending, each once"),
        ({"vq": "vq1d16-ballxall-g64", "table": [*range(15), float("inf")]}, "levels must be finite, ascending, each once"),
    ],
)
def test_what_is_refused_says_where_and_why(scheme: dict, message: str):
    with pytest.raises(UsageError, match=r"^recipe r.yaml: linear") as error:
        parsed(scheme)
    with pytest.raises(UsageError, match=message):
        raise error.value


def test_stock_onnx_runtime_has_no_kernel_for_codebooks():
    with pytest.raises(UnsupportedError, match="recipe vq2: linear: .*vq2d16-b16x128-g128; nearest: int4-g32-sym"):
        check_recipe(recipes.load("vq2"))


def assigned(scheme: dict, **allow: int):
    model = analysed("llama")
    context = context_of(model, scheme, samples=0, allow=allow)
    context.schemes.clear()
    trace = Trace()
    PassManager(trace).run(model.graph, context, [AssignFormats()])
    return context, trace.entries[-1].record


def test_blocks_too_small_for_a_codebook_get_another_format_and_count_as_fallbacks():
    """A 2D codebook of 256 in blocks of 16 x 128 has four entries for a vector: larger than 4 bits."""
    small = {"vq": "vq2d256-b16x128-g128", "instead": {"bits": 3, "group": 64}}
    context, record = assigned(small, fallbacks=99)
    assert record["fallbacks"]
    for fallback in record["fallbacks"]:
        assert "would take" in fallback["reason"] and "int3-g64-sym in place of vq2d256-b16x128-g128" in fallback["reason"]
        assert context.schemes[fallback["node"]] == Scheme(bits=3, group=64)
    with pytest.raises(GateError, match="fallbacks, 0 allowed"):
        assigned(small)


def test_without_a_wish_it_is_four_bits_with_the_same_activations():
    scheme = VqScheme(vq="vq2", activations="int8-block128")
    assert scheme.fallback.weight_format == AffineFormat(4, 32) and scheme.fallback.activations == "int8-block128"


def test_a_matrix_that_is_large_enough_keeps_its_format():
    context, record = assigned(VQ2)
    assert not record["fallbacks"]
    formats = {name: scheme.weight_format for name, scheme in context.schemes.items() if isinstance(scheme, VqScheme)}
    assert formats and set(formats.values()) == {VqFormat(2, 16, 16, 128, 128)}
