"""Decoders whose layers keep more than keys and values, or something else: convolutions, recurrences, index keys."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils import _pytree

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.capture.feeds import feed, steps
from qcompiler.capture.prepare import prepare
from qcompiler.capture.states import STEP
from qcompiler.errors import UnsupportedError
from qcompiler.recipe import Allow
from qcompiler.runtime.session import Session
from tests.captures import ANALYSE, NORMALISE, Analysed, Stepper, captured, relative_error, run
from tests.pipeline.rewire import float_artifact
from tests.pipeline.test_architectures import FakeQuantized

VOCABULARY = 128
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
_MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=32)
_MLA = dict(
    _SIZES, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
    v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
    moe_intermediate_size=32, first_k_dense_replace=1, index_topk=8, index_n_heads=4, index_head_dim=32,
)  # fmt: skip
# class, configuration, the most tokens at once (None: any number), how the cache works once compiled
MODELS: dict[str, tuple[str, dict, int | None, str]] = {
    "lfm2": ("Lfm2ForCausalLM", dict(_SIZES, layer_types=["conv", "full_attention"]), None, "shared"),
    "mamba": ("MambaForCausalLM", dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8), 1, "state"),
    "mamba2": (
        "Mamba2ForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=16, n_groups=2),
        STEP, "state",
    ),
    "falcon_h1": ("FalconH1ForCausalLM", dict(_SIZES, **_MAMBA, mamba_d_ssm=128), STEP, "shared"),
    "jamba": (
        "JambaForCausalLM",
        dict(_SIZES, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8, num_experts=1),
        1, "shared",
    ),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _MLA, None, "growing"),
}  # fmt: skip
EVERY = [name if name in ("lfm2", "mamba", "jamba") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@functools.cache
def made(name: str) -> Analysed:
    class_name, options, _, _ = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    prepared = prepare(model)
    graph = captured(prepared)
    return Analysed(model, prepared, graph, run(graph, NORMALISE) | run(graph, ANALYSE), {})


def pieces(name: str, *sizes: int) -> list[int]:
    step = MODELS[name][2] or max(sizes)
    return [min(step, size - at) for size in sizes for at in range(0, size, step)]


@pytest.mark.parametrize("name", EVERY)
def test_steps_from_nothing_on_give_the_logits_of_a_whole_text(name: str) -> None:
    case = made(name)
    assert case.prepared.step == MODELS[name][2]
    tokens = torch.randint(3, VOCABULARY, (1, 34), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = case.model(input_ids=tokens).logits
    step = Stepper(case.graph.module, case.prepared)
    # Among them as many as a chunk has, and more.
    for new in pieces(name, 1, 6, 1, 5, 1, 20):
        start = step.past
        assert relative_error(step(tokens[:, start : start + new]), expected[:, start : start + new]) < 1e-5, start


@pytest.mark.parametrize("name", EVERY)
def test_a_graph_leaves_the_states_that_it_is_given(name: str) -> None:
    case = made(name)
    given = feed(case.prepared, torch.tensor([[5]]))
    before = copy.deepcopy(_pytree.tree_leaves(given))
    with torch.no_grad():
        case.graph.module(**given)
    for now, then in zip(_pytree.tree_leaves(given), before, strict=True):
        assert torch.equal(now, then)


def test_a_model_that_cannot_carry_states_over_takes_one_token_and_says_so() -> None:
    prepared = made("mamba").prepared
    assert prepared.inputs["input_ids"].shape == (1, 1)
    (note,) = prepared.notes
    assert note.startswith("one token at a time: ")
    with pytest.raises(UnsupportedError, match="takes 1 tokens at once, found 3: run them in steps"):
        feed(prepared, torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_samples_run_through_a_graph_in_the_steps_that_it_takes(name: str) -> None:
    case = made(name)
    tokens = torch.arange(3, 10)[None]
    with torch.no_grad():
        logits = torch.cat([case.graph.module(**given).logits for given in steps(case.prepared, tokens)], 1)
        assert relative_error(logits, case.model(input_ids=tokens).logits) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_a_session_computes_what_the_fake_quantized_graph_computes(name: str, tmp_path: Path) -> None:
    case = made(name)
    recipe = {"name": "states", "linear": {"bits": 4, "group": 32}, "allow": {"min_coverage": 0}}
    result = qcompiler.compile(case.model, output=tmp_path / "out", recipe=recipes.load(recipe), samples=0)
    cache = result.manifest["cache"]
    assert (cache["kind"], cache["step"]) == (MODELS[name][3], MODELS[name][2])
    roles = {port["name"]: port["role"] for port in result.manifest["inputs"] + result.manifest["outputs"]}
    assert cache["states"]
    assert all((roles[s["past"]], roles[s["present"]]) == ("past_state", "present_state") for s in cache["states"])
    fake = FakeQuantized(case, result.quantizer.context.solutions, result.quantizer.context.schemes, True)

    def module(**given):
        leaves = _pytree.tree_leaves(fake.run(*_pytree.tree_leaves(given)))
        return _pytree.tree_unflatten(leaves, case.graph.module._out_spec)

    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 24)
    sizes = pieces(name, 15, 1, 1, 7)
    step = Stepper(module, case.prepared)
    expected = np.stack(
        [step(torch.from_numpy(tokens[None, step.past : step.past + new]))[0, -1].numpy() for new in sizes]
    )
    session = Session(float_artifact(tmp_path / "out", tmp_path / "float"), threads=1, capacity=8)
    ends = np.cumsum(sizes)
    for _ in range(2):  # the second time from a cache that was reset
        session.reset()
        found = [session.prefill(tokens[end - new : end]) for end, new in zip(ends, sizes, strict=True)]
        assert np.abs(np.stack(found) - expected).max() <= 1e-4 * np.abs(expected).max()
    # Cut by the session itself.
    np.testing.assert_allclose(session.logits(tokens)[ends - 1], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_the_torch_target_carries_states_too(name: str, tmp_path: Path) -> None:
    case, recipe = made(name), replace(recipes.load("int4-weights"), allow=Allow(min_coverage=0))
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 12)
    logits = []
    for target in ("onnx", "torch"):
        qcompiler.compile(case.model, output=tmp_path / target, recipe=recipe, target=target, samples=0)
        session = Session(tmp_path / target, threads=1)
        session.prefill(tokens[:9])
        logits.append([session.step(int(token)) for token in tokens[9:]])
    np.testing.assert_allclose(*logits, atol=1e-4 * np.abs(logits[0]).max())


def test_positions_that_do_not_begin_at_zero_are_left_to_the_model() -> None:
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, is_decoder=True,
    )  # fmt: skip
    model = transformers.RobertaForCausalLM(config).eval()
    prepared = prepare(model)
    assert "position_ids" not in prepared.inputs
    tokens = torch.arange(3, 15)[None]
    step = Stepper(captured(prepared).module, prepared)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    assert relative_error(torch.cat([step(tokens[:, :7]), step(tokens[:, 7:])], 1), expected) < 1e-5


class Forgetful(transformers.LlamaForCausalLM):
    """Its steps with a cache are no continuation of the text."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.get_seq_length() > output.logits.shape[1]:
            output.logits = output.logits.flip(-1)
        return output


def test_a_cache_that_changes_the_model_is_refused() -> None:
    config = transformers.LlamaConfig(**_SIZES, max_position_embeddings=64)
    with pytest.raises(UnsupportedError, match="llama: steps of 2 tokens with a cache differ by .* from the model"):
        prepare(Forgetful(config))
