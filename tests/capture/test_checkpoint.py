from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from qcompiler.capture.checkpoint import load
from qcompiler.errors import InputError, QCompilerError, UnsupportedError

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=True, dtype="bfloat16",
)  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).bfloat16().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def refused(directory: Path, error: type[QCompilerError], *words: str) -> None:
    with pytest.raises(error) as caught:
        load(directory)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_weights(directory: Path, change) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def test_a_checkpoint_is_loaded_in_float32_for_inference(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    loaded = load(checkpoint)
    assert type(loaded.model) is LlamaForCausalLM and not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.source_description == "small" and loaded.directory == checkpoint
    assert [path.name for path in loaded.tokenizer_files] == ["tokenizer.json"]
    assert [path.name for path in loaded.config_files] == ["config.json", "generation_config.json"]
    assert loaded.notes == []
    assert capfd.readouterr() == ("", "")


def test_a_tied_head_that_is_not_in_the_file_is_fine(checkpoint: Path) -> None:
    assert "lm_head.weight" not in load_file(checkpoint / WEIGHTS)
    model = load(checkpoint).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_shards(sharded: Path) -> None:
    assert (sharded / INDEX).is_file()
    load(str(sharded))


def test_the_reference_model() -> None:
    loaded = load("reference")
    assert loaded.source_description == "reference"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in loaded.tokenizer_files}


def test_a_classifier_is_loaded_as_what_its_configuration_names(tmp_path: Path) -> None:
    sizes = {key: SMALL[key] for key in SMALL if key not in ("tie_word_embeddings", "dtype")}
    BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).save_pretrained(tmp_path)
    assert type(load(tmp_path).model) is BertForSequenceClassification


def test_tensors_that_nobody_uses_are_noted(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    assert load(checkpoint).notes == ["1 tensors of the checkpoint are not used: extra.weight"]


def test_no_such_directory() -> None:
    refused(Path("/nowhere/at/all"), InputError, "no such directory", "/nowhere/at/all")
    refused(Path("nowhere"), InputError, "no such directory", "'nowhere'")


def test_a_hub_id_without_a_network_names_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(InputError, match="'someone/something' is no local directory .* network is unreachable"):
        load("someone/something")


def test_a_local_checkpoint_never_asks_the_network(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", fail)
    load(checkpoint)


def test_a_file_is_no_directory(checkpoint: Path) -> None:
    refused(checkpoint / WEIGHTS, InputError, "is a file", "expected a checkpoint directory")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, InputError, "is not a model: no config.json")


@pytest.mark.parametrize("content, word", [("{", "no readable JSON"), ("[]", "expected an object"), ("\x80", "JSON")])
def test_a_broken_config(checkpoint: Path, content: str, word: str) -> None:
    (checkpoint / "config.json").write_bytes(content.encode("latin-1"))
    refused(checkpoint, InputError, "config.json", word)


def test_a_config_with_wrong_values(checkpoint: Path) -> None:
    change_config(checkpoint, hidden_size="wide")
    refused(checkpoint, InputError, "config.json")


def test_a_model_that_transformers_does_not_know(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="unheard_of")
    refused(checkpoint, UnsupportedError, "config.json", "'unheard_of'")
    change_config(checkpoint, auto_map={"AutoModel": "code.Model"})
    refused(checkpoint, UnsupportedError, "code of its own", "never run")


def test_an_architecture_that_transformers_does_not_know(checkpoint: Path) -> None:
    change_config(checkpoint, architectures=["UnheardOfModel"])
    refused(checkpoint, UnsupportedError, "'UnheardOfModel'")


def test_a_quantized_checkpoint(checkpoint: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(checkpoint, UnsupportedError, "quantized already (gptq)")


@pytest.mark.parametrize("dtype, word", [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_quantized_checkpoint_that_does_not_say_so(checkpoint: Path, dtype: torch.dtype, word: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(checkpoint, lambda weights: weights.update({name: weights[name].float().to(dtype)}))
    refused(checkpoint, UnsupportedError, WEIGHTS, f"{name} is stored as {word}", "quantized already")


def test_an_adapter(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(checkpoint, UnsupportedError, "adapter")


def test_pickles_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, InputError, "pytorch_model.bin", "safetensors")


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    refused(checkpoint, InputError, "no weights", WEIGHTS)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(checkpoint: Path, kept: int) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(content[:kept])
    refused(checkpoint, InputError, WEIGHTS, "damaged or truncated")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, InputError, "lacks the shard", shard.name)


def test_a_damaged_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(sharded, InputError, shard.name, "damaged or truncated")


def test_an_index_that_promises_a_tensor_which_is_not_there(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, InputError, "lost.weight")


def test_an_index_that_points_outside(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][NORM] = "../other.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, InputError, "outside the checkpoint")


def test_a_missing_weight_is_never_made_up(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop(NORM))
    refused(checkpoint, InputError, "lacks 1 weights", NORM)


def test_a_weight_of_another_shape(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({NORM: torch.ones(5)}))
    refused(checkpoint, InputError, "does not fit LlamaForCausalLM", f"{NORM} is [5], expected [16]")


@pytest.mark.parametrize("bad, word", [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")])
def test_a_weight_that_is_not_finite(checkpoint: Path, bad: float, word: str) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[NORM][3] = bad

    change_weights(checkpoint, spoil)
    refused(checkpoint, InputError, NORM, word)
