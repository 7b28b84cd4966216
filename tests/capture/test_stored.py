"""Checkpoints that stay in their files: what stands in for a weight, and that nothing but memory changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from qcompiler.capture.capture import captured
from qcompiler.capture.checkpoint import Loaded, load
from qcompiler.capture.prepare import prepare
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.stored import StoredWeights, widen_buffers
from qcompiler.graph.constants import attribute, storage_key
from qcompiler.graph.verify import verify

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
IDS = torch.arange(7)[None]


def checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, dtype=str(dtype).removeprefix("torch."))).to(dtype).save_pretrained(folder)
    return folder


def ready(loaded: Loaded) -> Prepared:
    with loaded.stored.lent(loaded.model):
        prepared = prepare(loaded.model)
    prepared.stored = loaded.stored
    return prepared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_get_stand_ins_that_read_as_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path / "model", dtype), as_it_is_stored=True)
    file = load_file(tmp_path / "model" / "model.safetensors")
    assert loaded.notes == []
    for name, parameter in loaded.model.named_parameters():
        stored = loaded.stored.by_address[parameter.data_ptr()]
        assert parameter.dtype is torch.float32 and not parameter.requires_grad and not parameter.any()
        assert stored.dtype is dtype and torch.equal(stored, file[name])


def test_tied_weights_have_one_stand_in(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path, torch.bfloat16), as_it_is_stored=True)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert len(loaded.stored.by_address) == len(list(loaded.model.parameters()))


def test_float32_weights_are_the_files_own(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path, torch.float32), as_it_is_stored=True)
    assert not loaded.stored and loaded.notes == []
    file = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(parameter, file[name]) for name, parameter in loaded.model.named_parameters())


def test_a_lent_model_computes_what_the_widened_one_does(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, torch.bfloat16)
    loaded, widened = load(directory, as_it_is_stored=True), load(directory).model
    with torch.no_grad():
        with loaded.stored.lent(loaded.model):
            assert torch.equal(loaded.model(IDS).logits, widened(IDS).logits)
            assert not any(parameter.any() for parameter in loaded.model.parameters()), "held after the call"
        assert not loaded.model(IDS).logits.any(), "still lent"


def test_a_call_that_fails_gives_the_weights_back(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path, torch.bfloat16), as_it_is_stored=True)
    with loaded.stored.lent(loaded.model):
        with pytest.raises(IndexError):
            loaded.model(torch.tensor([[SMALL["vocab_size"]]]))
        assert not any(parameter.any() for parameter in loaded.model.parameters())


def test_the_captured_graph_has_the_stored_weights(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, torch.bfloat16)
    prepared, widened = ready(load(directory, as_it_is_stored=True)), load(directory).model
    graph = captured(prepared)
    verify(graph, "captured")
    weights = {name: value for name, value in widened.named_parameters(remove_duplicate=False)}
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"} & set(weights)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= names
    for name in names:
        assert attribute(graph.module, name).dtype is torch.bfloat16
        assert torch.equal(graph.constant(name), weights[name])
    head, table = (attribute(graph.module, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert storage_key(head) == storage_key(table)


def test_materialised_the_graph_computes_what_the_model_does(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", torch.bfloat16)
    prepared, widened = ready(load(directory, as_it_is_stored=True)), load(directory).model
    graph = captured(prepared)
    assert graph.materialise(tmp_path) > 0 and graph.materialise() == 0
    head, table = (attribute(graph.module, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert head.dtype is torch.float32 and storage_key(head) == storage_key(table)
    with torch.no_grad():
        found, expected = graph.module(**prepared.example()), widened(**prepared.example())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_what_is_traced_with_is_what_the_widened_model_gives(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, torch.bfloat16)
    found, expected = ready(load(directory, as_it_is_stored=True)), prepare(load(directory).model)
    assert found.axes == expected.axes and found.inputs.keys() == expected.inputs.keys()
    for ours, theirs in zip(
        found.inputs["past_key_values"].layers, expected.inputs["past_key_values"].layers, strict=True
    ):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values) and ours.values.any()


def test_without_a_quantizer_the_weights_are_widened(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, torch.bfloat16)
    program = ready(load(directory, as_it_is_stored=True)).export_torch()
    weights = dict(load(directory).model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(value, weights[name]) for name, value in program.state_dict.items() if name in weights)
    assert "model.norm.weight" in program.state_dict


def test_weights_that_are_merged_while_loading_are_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SMALL | dict(tie_word_embeddings=False, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    MixtralForCausalLM(MixtralConfig(**sizes, dtype="bfloat16")).bfloat16().save_pretrained(tmp_path)
    loaded, widened = load(tmp_path, as_it_is_stored=True), load(tmp_path).model
    (note,) = loaded.notes
    assert "merged or split from the checkpoint's tensors and held in memory" in note and "experts" in note
    for name, weight in widened.named_parameters():
        found = loaded.model.get_parameter(name)
        assert torch.equal(loaded.stored.by_address[found.data_ptr()].float(), weight)


def test_buffers_are_widened_where_they_were_left() -> None:
    module = torch.nn.Module()
    module.register_buffer("left", torch.tensor([1.5, 2.0], dtype=torch.bfloat16))
    module.register_buffer("own", torch.tensor([1.5, 2.0], dtype=torch.bfloat16))
    widen_buffers(module, {module.left.data_ptr()})
    assert (module.left.dtype, module.own.dtype) == (torch.float32, torch.bfloat16)
    assert module.left.tolist() == [1.5, 2.0]


def test_a_stand_in_cannot_be_taken_for_another() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    stored = StoredWeights.stand_in(model)
    assert len(stored.by_address) == 4
    stored.put_back(model)
    assert all(torch.equal(found, weight) for found, weight in zip(model.parameters(), weights, strict=True))
