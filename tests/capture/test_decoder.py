"""What a decoder is prepared with, whatever its checkpoint asks of generation."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from qcompiler.capture.prepare import prepare
from tests.models import tiny


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "hybrid"},
        {"num_beams": 4},
        {"do_sample": True, "temperature": 0.5, "eos_token_id": list(range(512))},
        {"use_cache": False},
    ],
)
def test_the_checkpoint_s_generation_settings_do_not_matter(settings: dict) -> None:
    model = tiny("gemma2")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    prepared = prepare(model)
    assert prepared.inputs["input_ids"].shape == (1, 2)
    assert {type(layer) for layer in prepared.inputs["past_key_values"].layers} == {DynamicLayer}
    assert model.generation_config is own


def test_every_cache_varies_along_the_axis_that_grew() -> None:
    prepared = prepare(tiny("gemma3_text"))
    caches = {path: axes for path, axes in prepared.axes.items() if path.startswith("past_key_values")}
    assert len(caches) == 4 and all(axes == {2: "past_length"} for axes in caches.values())


def test_an_example_is_a_copy_that_a_forward_pass_may_write_into() -> None:
    prepared = prepare(tiny("llama"))
    with torch.no_grad():
        prepared.module(**prepared.arguments())
    assert prepared.example()["past_key_values"].layers[0].keys.shape[2] == 5
