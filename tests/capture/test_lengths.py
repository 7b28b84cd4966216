"""Models whose own code asks how long a text is: the graph is right up to that length, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qcompiler
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
