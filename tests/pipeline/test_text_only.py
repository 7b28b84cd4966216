"""Models that take more than text: refused, or their text path alone where that is asked for."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.capture.prepare import prepare
from qcompiler.errors import UnsupportedError
from qcompiler.recipe import Allow
from qcompiler.report.compiled import form_lines
from qcompiler.runtime.session import Session

VOCABULARY = 96
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
RECIPE = replace(recipes.load("int8-weights"), allow=Allow(min_coverage=0, text_only=True))


@functools.cache
def with_images() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, image_token_index=90, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_it_is_refused_with_what_to_ask_for(tmp_path: Path) -> None:
    for attempt in (
        lambda: prepare(with_images()),
        lambda: qcompiler.compile(with_images(), output=tmp_path / "out", recipe="int8-weights", samples=0),
    ):
        with pytest.raises(UnsupportedError, match=r"gemma3 .*takes more than text.*allow: \{text_only: true\}"):
            attempt()


def test_the_text_path_alone_says_what_it_leaves_out_and_computes_the_models_logits(tmp_path: Path) -> None:
    model = with_images()
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=RECIPE, samples=0)
    towers = (model.model.vision_tower, model.model.multi_modal_projector)
    sizes = [sum(parameter.nbytes for parameter in tower.parameters()) for tower in towers]
    assert list(result.manifest["left_out"].values()) == sizes
    assert all(name in form_lines(result.manifest)[0] for name in result.manifest["left_out"])
    assert result.quantizer.trace.entries[0].record["notes"]["left_out"] == result.manifest["left_out"]
    assert result.manifest["kind"] == "decoder" and result.manifest["allowed"]["text_only"] is True
    assert not any("vision" in layer["name"] for layer in result.layers["layers"])
    tokens = np.random.default_rng(0).integers(3, 80, 12)
    session = Session(result.path, threads=1)
    found = np.stack([session.prefill(tokens[:9]), *(session.step(int(token)) for token in tokens[9:])])
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, 8:].numpy()
    # Against the float model: 8 bits a weight.
    assert np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()


def test_a_model_of_text_alone_leaves_nothing_out() -> None:
    torch.manual_seed(0)
    prepared = prepare(transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT)), text_only=True)
    assert prepared.left_out == {} and prepared.notes == []
