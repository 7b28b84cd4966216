"""Load a model from a checkpoint directory, a hub id, or the bundled reference model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from qcompiler.capture.checkpoint_files import read_json, weight_files
from qcompiler.capture.export import last_message
from qcompiler.capture.finite import check_finite
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.stored import StoredWeights, as_stored, widen_buffers
from qcompiler.data import reference_model
from qcompiler.errors import InputError, UnsupportedError

REFERENCE = "reference"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model",
    "spiece.model",
)  # fmt: skip
_CONFIG_FILES = ("config.json", "generation_config.json")
# What a download is limited to: never pickles, never code.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass
class Loaded:
    """A model as it was loaded.

    Attributes:
        model: float32 on the CPU, in evaluation mode; what the checkpoint has in float32 is mapped from its files.
        config: the model's own.
        directory: where the checkpoint lies on this machine.
        source_description: what the user named: `reference`, a hub id, or the directory's name.
        tokenizer_files: the files of its tokenizer that exist.
        config_files: `config.json`, and `generation_config.json` where it exists.
        notes: what was noticed on the way, such as tensors that the model does not use.
        stored: what `model` has stand-ins for; empty unless `load` was asked for it.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    directory: Path
    source_description: str
    tokenizer_files: list[Path]
    config_files: list[Path]
    notes: list[str] = field(default_factory=list)
    stored: StoredWeights = field(default_factory=StoredWeights)


def load(source: str | Path, *, as_it_is_stored: bool = False) -> Loaded:
    """Load a checkpoint: a local directory, the word `reference`, or a hub id such as `org/name`.

    Only safetensors are read, and no code from a checkpoint is ever run. Nothing local touches the network.

    Args:
        as_it_is_stored: hold no weight in memory: parameters that are not float32 in the files become float32 stand-ins
            that read as zeros, and `stored` has them, mapped. Such a model is good for capture, not for running.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or incomplete; the message names the file or tensor.
        UnsupportedError: a sound checkpoint of a kind that cannot be compiled.
    """
    directory, description = locate(source)
    config_values = read_json(directory / "config.json", missing=f"{directory} is not a model: no config.json")
    _check_kind(directory, config_values)
    weight_files(directory)
    config = _config(directory)
    with as_stored() if as_it_is_stored else contextlib.nullcontext() as addresses:
        model, notes = _model(directory, config, config_values)
    if addresses is not None:
        widen_buffers(model, addresses)
        notes += _held_in_memory(model, addresses)
    check_finite(model, str(directory))
    stored = StoredWeights.stand_in(model) if as_it_is_stored else StoredWeights()
    return Loaded(
        model=model.eval().requires_grad_(False),
        config=config,
        directory=directory,
        source_description=description,
        tokenizer_files=[directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()],
        config_files=[directory / name for name in _CONFIG_FILES if (directory / name).is_file()],
        notes=notes,
        stored=stored,
    )


def _held_in_memory(model: PreTrainedModel, addresses: set[int]) -> list[str]:
    """A note of the weights that are no tensors of the files, but were made from several while loading."""
    made = {name: p.nbytes for name, p in model.named_parameters() if p.numel() and p.data_ptr() not in addresses}
    if not made:
        return []
    return [
        f"{len(made)} weights ({sum(made.values()):,} bytes) are merged or split from the checkpoint's tensors and held "
        f"in memory: {_few(list(made))}"
    ]


def locate(source: str | Path) -> tuple[Path, str]:
    """Where a checkpoint lies on this machine (a hub id is fetched), and what it is called in records.

    Raises:
        InputError: there is none.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        raise InputError(f"{text!r} is a file; expected a checkpoint directory with config.json and safetensors")
    if text == REFERENCE:
        bundled = reference_model()
        if not bundled.is_dir():
            raise InputError(f"the bundled reference model is missing from this installation (looked in {bundled})")
        return bundled, REFERENCE
    if _HUB_ID.match(text):
        return _downloaded(text), text
    raise InputError(
        f"no such directory: {text!r}; expected a checkpoint directory, a hub id (org/name) or {REFERENCE!r}"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with Quiet():
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with _silent():
            return Path(snapshot_download(hub_id, allow_patterns=_WANTED))
    except Exception as error:
        raise InputError(
            f"{hub_id!r} is no local directory and could not be fetched from the hub: {last_message(error)}"
        ) from error


def _check_kind(directory: Path, config: dict[str, Any]) -> None:
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedError(f"{directory} holds an adapter, not a model: merge it into its base model first")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(f"{directory} is quantized already ({method}); expected a float checkpoint")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        code = " and brings code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise UnsupportedError(
            f"{directory / 'config.json'}: model type {model_type!r} is unknown to transformers "
            f"{transformers.__version__}{code}"
        )


def _config(directory: Path) -> PreTrainedConfig:
    try:
        with _silent():
            return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{directory / 'config.json'} is refused: {last_message(error)}") from error


def _model(directory: Path, config: PreTrainedConfig, values: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    architecture = (values.get("architectures") or [None])[0]
    if architecture is None:
        loader: Any = AutoModel
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")) and type(config) in AutoModelForCausalLM._model_mapping:
        loader = AutoModelForCausalLM
    else:
        loader = getattr(transformers, architecture, None)
        if loader is None:
            raise UnsupportedError(
                f"{directory / 'config.json'}: architecture {architecture!r} is unknown to transformers "
                f"{transformers.__version__}"
            )
    try:
        with _silent():
            model, info = loader.from_pretrained(
                directory, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:
        raise InputError(f"{directory} cannot be loaded: {last_message(error)}") from error
    # Loaded in spite of them, so that they can be named; such a model holds made-up weights and goes no further.
    misfits = [
        f"{name} is {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    misfits += [str(message) for message in info.get("error_msgs") or ()]
    if misfits:
        raise InputError(f"{directory} does not fit {type(model).__name__}: {_few(misfits)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{directory} lacks {len(missing)} weights that {type(model).__name__} needs: {_few(missing)}")
    unused = sorted(info["unexpected_keys"])
    return model, [f"{len(unused)} tensors of the checkpoint are not used: {_few(unused)}"] if unused else []


def _few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
