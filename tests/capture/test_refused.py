"""Models of a form that cannot be compiled: an error that says what was found."""

from __future__ import annotations

import pytest
import torch
import transformers

import qcompiler
from qcompiler.capture.capture import captured
from qcompiler.capture.dimensions import program_ports
from qcompiler.capture.prepare import prepare
from qcompiler.errors import UnsupportedError

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
REFUSED = {
    "WhisperForConditionalGeneration": (
        dict(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        r"whisper \(WhisperForConditionalGeneration\) takes 'input_features', not token ids",
    ),
    "ViTModel": (
        dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32),
        "'pixel_values', not token ids",
    ),
    "RwkvForCausalLM": (
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=32),
        "rwkv: its own code holds the length of input_ids at 23",
    ),
    "RecurrentGemmaForCausalLM": (
        dict(SIZES, num_hidden_layers=3, head_dim=16, lru_width=32, attention_window_size=16),
        "recurrent_gemma: its own code holds the length of input_ids at 23",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_the_model_and_what_was_found(name: str) -> None:
    options, message = REFUSED[name]
    cls = getattr(transformers, name)
    with pytest.raises(UnsupportedError, match=message) as caught:
        prepare(cls(cls.config_class(**options))).export_torch(qcompiler.Quantizer("int8-weights"))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_the_encoder_of_an_encoder_decoder_is_an_encoder(name: str) -> None:
    cls = getattr(transformers, name)
    sizes = dict(vocab_size=64, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, decoder_ffn_dim=32)
    config = cls.config_class(**sizes, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32)
    encoder = cls(config).eval().get_encoder()
    prepared = prepare(encoder)
    assert prepared.kind == "encoder" and set(prepared.inputs) == {"input_ids", "attention_mask"}
    feed = {"input_ids": torch.arange(3, 30).reshape(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    feed["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        expected, found = encoder(**feed), captured(prepared).module(**feed)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_an_encoder_that_fixes_its_length_is_refused_and_named() -> None:
    config = transformers.FunnelConfig(
        vocab_size=64, block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=2, d_head=16, d_inner=32
    )
    prepared = prepare(transformers.FunnelModel(config))
    with pytest.raises(UnsupportedError, match="funnel: its own code holds the length of .* at 11"):
        prepared.export_onnx()
    with pytest.raises(UnsupportedError, match="funnel: its own code holds the length of .* at 11"):
        program_ports(prepared.export_torch(), prepared)
