"""What can be evaluated, brought into one form: tokens in, named outputs out."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import InputError, UnsupportedError, UsageError
from qcompiler.evaluate.tokens import Tokens, load_tokens
from qcompiler.evaluate.windows import Context

if TYPE_CHECKING:
    from qcompiler.runtime.device import Dtype

LOGITS = "logits"
# Of the largest logit: more than half precision on a device makes of the same numbers.
_AHEAD = 0.05

# Outputs of `transformers` models that are no result: caches, and what is only returned on request.
_NOT_RESULTS = {"past_key_values", "hidden_states", "attentions", "cross_attentions", "loss"}


@dataclass
class Target:
    """Something to evaluate.

    Attributes:
        name: for messages: the path where there is one.
        run: int64 `[length]` in; outputs by name without the batch axis, float arrays, out.
        causal: whether `run` gives `logits` `[length, vocabulary]` that predict the next token; None where only the
            shape of what comes out can tell.
        tokens: its tokenizer, or None.
        context: what is known of its context.
        alone: the only length of window that it computes as its float model does; None for any.
        label: for records, which name no path of this machine: the model, and the recipe that it was compiled with.
    """

    name: str
    run: Callable[[np.ndarray], dict[str, np.ndarray]]
    causal: bool | None = None
    tokens: Tokens | None = None
    context: Context = Context()
    alone: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        self.label = self.label or self.name


def open_target(source: Any, threads: int | None = None, device: str = "cpu", dtype: Dtype = "float32") -> Target:
    """Bring `source` into the form of a `Target`.

    Args:
        source: a directory with a compiled artifact, a model directory, `reference` or a hub id, an open `Session`, a
            torch module, or any function from tokens (int64 `[length]`) to logits (`[length, vocabulary]`, with or
            without a batch axis before).
        threads: threads of an artifact's session; None leaves it to ONNX Runtime.
        device: where what is read from a directory or the hub is to run; whatever is given open stays where it is.
        dtype: of an artifact's float activations there.

    Raises:
        InputError: there is nothing of that name, or it cannot be read.
        UnsupportedError: a model whose input is more than one text.
        UsageError: `source` is none of these.
    """
    if isinstance(source, Target):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if (path / "manifest.json").is_file():
            from qcompiler.runtime.session import Session

            return _of_session(Session(path, threads=threads, device=device, dtype=dtype))
        return _of_checkpoint(os.fspath(source), device)
    if hasattr(source, "artifact") and hasattr(source, "logits"):
        return _of_session(source)
    if _is_module(source):
        return _of_module(source)
    if callable(source):
        name = getattr(source, "__name__", type(source).__name__)
        return Target(name, lambda tokens: {LOGITS: _array(source(tokens), batch=3)}, causal=True)
    raise UsageError(
        f"cannot evaluate {type(source).__name__}: expected a directory, a hub id, a torch module or a function"
    )


def _of_session(session: Any) -> Target:
    artifact = session.artifact
    directory = Path(artifact.path)
    config = _read_config(directory)
    context = Context(Context.of_config(config).trained, artifact.context or Context.of_config(config).positions)
    context = context.within(artifact.longest)
    tokens = _tokens_in(directory)
    model = artifact.manifest.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    label = f"{source or directory.name} ({artifact.manifest.get('recipe') or artifact.target})"
    if artifact.kind == "decoder":
        return Target(
            str(directory), lambda ids: {LOGITS: session.logits(ids)}, artifact.causal, tokens, context, label=label
        )
    if artifact.kind == "encoder-decoder" and artifact.decoder_start:

        def answer(ids: np.ndarray) -> dict[str, np.ndarray]:
            session.read(ids)
            return {LOGITS: session.logits(_behind(artifact.decoder_start[0], ids))[1:]}

        return Target(str(directory), answer, True, tokens, context.shorter(1), label=label)
    info = artifact.input("tokens")
    if info is None or artifact.kind == "encoder-decoder":
        raise UnsupportedError(f"{directory} takes no tokens, so it cannot be evaluated on a text")

    def run(ids: np.ndarray) -> dict[str, np.ndarray]:
        return {name: _array(value) for name, value in session.run(**{info.name: ids[None]}).items()}

    alone = None if artifact.fixed is None or artifact.fixed.exact else artifact.fixed.tokens
    return Target(str(directory), run, False, tokens, context, alone, label)


def _of_checkpoint(source: str, device: str) -> Target:
    from qcompiler.capture.checkpoint import load
    from qcompiler.runtime.device import check_fits, find_device, tensor_bytes

    place = find_device(device, kernels=False)
    loaded = load(source)
    check_fits(place, {"its weights": tensor_bytes(loaded.model)}, source, "free memory on the device, or leave --device away")
    module: Any = loaded.model
    target = _of_module(module.to(place))
    target.name, target.label = source, loaded.source_description
    target.tokens = _tokens_in(loaded.directory)
    return target


def _of_module(module: Any) -> Target:
    import torch

    name, config = type(module).__name__, getattr(module, "config", None)
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    # A cache is of no use for whole windows; models that know the switch return less without it.
    options = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}

    both = _two_texts(module)

    def run(tokens: np.ndarray) -> dict[str, np.ndarray]:
        with _inference(module), torch.inference_mode():
            ids = torch.from_numpy(tokens)[None].to(device)
            if both is None:
                return _named(module(ids, **options))
            begin = torch.from_numpy(_behind(both, tokens))[None].to(device)
            return {LOGITS: _named(module(input_ids=ids, decoder_input_ids=begin, **options))[LOGITS][1:]}

    source = getattr(config, "_name_or_path", "")
    tokens = _tokens_in(Path(source)) if source else None
    context = Context() if config is None else Context.of_config(config)
    causal = _is_causal(module)
    if causal and both is None and _looks_ahead(run, config):
        causal = False
    return Target(name, run, causal, tokens, context if both is None else context.shorter(1))


def _looks_ahead(run: Callable[[np.ndarray], dict[str, np.ndarray]], config: Any) -> bool:
    """Whether later tokens change the logits of earlier ones, beyond what another order of adding does."""
    vocabulary = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None) or 8
    tokens = np.arange(3, 11) % vocabulary
    whole, part = (run(given).get(LOGITS) for given in (tokens, tokens[:4]))
    if whole is None or part is None or whole.shape[:1] != (8,) or part.shape != whole[:4].shape:
        return False
    return bool(np.abs(whole[:4] - part).max() > _AHEAD * np.abs(whole).max())


def _two_texts(module: Any) -> int | None:
    """The token that the decoder of an encoder-decoder begins with; None for any other model.

    Both its texts are then the window: the decoder's begins with that token, and is scored on the window's.
    """
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    from qcompiler.capture.encoder_decoder import start_token

    start = start_token(module)
    if start is None or module.get_output_embeddings() is None:
        raise UnsupportedError(
            f"{type(module).__name__} is an encoder-decoder without "
            f"{'a head' if start is not None else 'a token that its decoder begins with'}: it predicts no text"
        )
    return start


def _behind(start: int, tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([np.array([start], np.int64), tokens])


@contextmanager
def _inference(module: Any) -> Iterator[None]:
    """Without dropout, and afterwards in the mode that it was in."""
    training = module.training
    try:
        if training:
            module.eval()
    except NotImplementedError:  # the mode of an exported program was fixed when it was exported
        training = False
    try:
        yield
    finally:
        if training:
            module.train()


def _is_causal(module: Any) -> bool | None:
    """Whether the logits of a `transformers` model predict the next token; None for any other module."""
    if not hasattr(module, "get_output_embeddings"):
        return None
    # A masked model has a head over the vocabulary too, but has seen the token that it would be scored on.
    return module.get_output_embeddings() is not None and not type(module).__name__.endswith("ForMaskedLM")


def _is_module(source: Any) -> bool:
    # Asked by name, so that evaluating artifacts alone never imports torch.
    return any(
        base.__module__ == "torch.nn.modules.module" and base.__name__ == "Module" for base in type(source).__mro__
    )


def _named(output: Any) -> dict[str, np.ndarray]:
    """The tensors of a module's output: a tensor alone is `logits`, those of a tuple are `0`, `1` …"""
    if isinstance(output, Mapping):
        items = [(name, value) for name, value in output.items() if name not in _NOT_RESULTS]
    elif isinstance(output, tuple | list):
        items = [(LOGITS if len(output) == 1 else str(i), value) for i, value in enumerate(output)]
    else:
        items = [(LOGITS, output)]
    return {name: _array(value) for name, value in items if hasattr(value, "shape")}


def _array(value: Any, batch: int | None = None) -> np.ndarray:
    """As a float32 array, without the leading batch axis of 1 (only where there are `batch` axes, if that is given)."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    array = np.asarray(value)
    if array.ndim > 1 and array.shape[0] == 1 and batch in (None, array.ndim):
        array = array[0]
    return array.astype(np.float32, copy=False)


def _tokens_in(directory: Path) -> Tokens | None:
    """The tokenizer that lies beside a model, if any."""
    found = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return load_tokens(directory) if found else None


def _read_config(directory: Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    return config if isinstance(config, dict) else {}
