"""Models whose own code asks how long a text is: the graph is right up to that length, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qcompiler
from qcompiler.capture.frequencies import frequencies_change_after
from qcompiler.errors import CapacityError
from qcompiler.runtime.session import Session
from tests.models import tiny

LONGEST = 28  # of blocks of 4 with one at random: (5 + 2 * 1) * 4


def test_a_model_of_sparse_blocks_is_right_up_to_where_it_is_dense(tmp_path: Path) -> None:
    config = transformers.BigBirdConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, block_size=4,
        num_random_blocks=1, attention_type="block_sparse", max_position_embeddings=128, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BigBirdModel(config).eval()
    recipe = {"name": "lengths", "linear": {"bits": 8, "group": 32, "activations": "float"}}
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=recipe, samples=0)
    assert result.manifest["longest"] == LONGEST
    session = Session(tmp_path / "out", threads=1)
    tokens = np.random.default_rng(0).integers(3, 64, (2, LONGEST + 1))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens[:, :LONGEST])).last_hidden_state.numpy()
    found = session.run(input_ids=tokens[:, :LONGEST])["last_hidden_state"]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    with pytest.raises(CapacityError, match="29 tokens are more than the 28 that .* was compiled for"):
        session.run(input_ids=tokens)


def test_any_other_says_nothing_of_it(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    result = qcompiler.compile(model, output=tmp_path / "out", recipe="int8", samples=0)
    assert "longest" not in result.manifest and Session(tmp_path / "out").artifact.longest is None


@pytest.mark.parametrize("model_type", ["gpt_neo", "mpt"])  # two names for how many positions there are
def test_the_end_of_a_model_s_positions_is_no_limit_of_the_trace(model_type: str, tmp_path: Path) -> None:
    # Its code asks whether the text fills the table of positions, which leaves a guard there.
    result = qcompiler.compile(tiny(model_type), output=tmp_path / "out", recipe="int8", samples=0)
    assert result.manifest["cache"].get("step") is None


def test_keys_in_a_cache_are_of_the_frequencies_of_a_short_text(tmp_path: Path) -> None:
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
        max_position_embeddings=48, original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 12, "long_factor": [4.0] * 12,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    recipe = {"name": "lengths", "linear": {"bits": 8, "group": 32}, "head": {"bits": 8}}
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=recipe, samples=0)
    assert result.manifest["longest"] == 16 and result.manifest["context"] == 48
    session = Session(tmp_path / "out", threads=1)
    tokens = np.random.default_rng(0).integers(3, 64, 17)
    session.prefill(tokens[:9])
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens[None, :16])).logits[0, -1].numpy()
    assert np.abs(session.prefill(tokens[9:16]) - expected).max() < 0.05 * np.abs(expected).max()
    with pytest.raises(CapacityError, match="17 tokens are more than the 16 that .* was compiled for"):
        session.step(int(tokens[16]))


@pytest.mark.parametrize("long, positions, bound", [(4.0, 48, 16), (1.0, 48, None), (4.0, 16, None)])
def test_frequencies_that_never_change(long: float, positions: int, bound: int | None) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0], "long_factor": [long]}
    config = transformers.LlamaConfig(max_position_embeddings=positions)
    config.rope_parameters = rope
    assert frequencies_change_after(config) == bound
    config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert frequencies_change_after(config) == bound
