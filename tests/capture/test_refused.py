"""Models of a form that cannot be compiled: an error that says what was found."""

from __future__ import annotations

import pytest
import transformers

from qcompiler.capture.prepare import prepare
from qcompiler.errors import UnsupportedError

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
REFUSED = {
    "T5ForConditionalGeneration": (
        dict(vocab_size=64, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2),
        r"t5 \(T5ForConditionalGeneration\) is an encoder-decoder",
    ),
    "ViTModel": (
        dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32),
        "'pixel_values', not token ids",
    ),
    "MambaForCausalLM": (
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=1), "its cache holds more than keys and values"
    ),
    "Qwen3NextForCausalLM": (dict(SIZES, num_hidden_layers=4), "its cache holds more than keys and values"),
    "XLNetLMHeadModel": (dict(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=32), "xlnet: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_the_model_and_what_was_found(name: str) -> None:
    options, message = REFUSED[name]
    cls = getattr(transformers, name)
    with pytest.raises(UnsupportedError, match=message) as caught:
        prepare(cls(cls.config_class(**options)))
    assert caught.value.exit_code == 4
