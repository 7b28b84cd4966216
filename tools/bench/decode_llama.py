"""llama.cpp, through llama-cpp-python: the checkpoint as GGUF, quantized by its own quantizer, run by its C interface.

Its ggml repacks weights at load where the processor has a kernel for that; nothing is switched off.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.artifacts import Facts, kept, source_key
from tools.bench.decode_engines import Skip, llama_configuration, weights

BATCH = 512  # tokens that go through the graph at once, llama.cpp's own default

# Name in a checkpoint -> name in a GGUF file; those of a layer with `{}` for its number.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def prepare(source: str, label: str, variant: str, work: Path, again: bool) -> Facts:
    """The checkpoint in the GGUF type `variant` (`F16`, `Q8_0`, `Q4_K_M`, …)."""
    import llama_cpp

    llama_configuration(source)
    if variant != "F16" and not hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}"):
        raise Skip(f"llama.cpp has no file type {variant}")
    key = {"source": source_key(source)}
    plain = kept(work / f"{label}-F16.gguf", key, write, source, again=again)
    if variant == "F16":
        return plain
    key |= {"type": variant, "llama_cpp_python": llama_cpp.__version__}
    return kept(work / f"{label}-{variant}.gguf", key, quantize, plain["path"], variant, again=again)


def write(path: Path, source: str) -> Facts:
    """The checkpoint as GGUF: matrices in float16, norms in float32, and no vocabulary (tokens go in by number)."""
    import gguf

    config = llama_configuration(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in weights(source).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        target = gguf_name(name)
        array = tensor.float().numpy()
        if (count := heads.get(target.split(".")[-2])) is not None:
            array = interleaved(array, count)
        writer.add_tensor(target, array if array.ndim == 1 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return described(path)


def gguf_name(name: str) -> str:
    """The name in GGUF of the checkpoint's tensor `name`."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of `weight` [heads * d, k] from the checkpoint's order of a rotation's pairs (i, i + d/2) to GGUF's (2i, 2i + 1)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def quantize(path: Path, plain: str, variant: str) -> Facts:
    """The GGUF file `plain` in another type, by llama.cpp's own quantizer with its defaults, without importances."""
    import llama_cpp

    _quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
    parameters.nthread = 0  # one for each processor
    failed = llama_cpp.llama_model_quantize(plain.encode(), str(path).encode(), ctypes.byref(parameters))
    if failed or not path.is_file():
        raise Skip(f"llama_model_quantize to {variant} returned {failed}")
    return described(path)


def described(path: Path) -> Facts:
    """Bytes of the file and of what a token reads of it, and the bytes of every type in it."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    lookup = "token_embd.weight" if "output.weight" in tensors else None
    types: dict[str, int] = {}
    for tensor in tensors.values():
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    read = sum(int(t.n_bytes) for name, t in tensors.items() if len(t.shape) > 1 and name != lookup)
    return {"file_bytes": path.stat().st_size, "bytes_a_token": read, "types": types}


class Runner:
    """See `decode_engines.Engine`: one context over one model, tokens by `llama_decode`, logits of the last one only."""

    def __init__(self, path: str, threads: int, capacity: int) -> None:
        import llama_cpp

        self._llama: Any = llama_cpp
        _quiet()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{path} cannot be loaded by llama.cpp")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp made no context of {capacity} positions")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), BATCH):
            logits = self._decode(tokens[start : start + BATCH])
        return logits

    def step(self, token: int) -> np.ndarray:
        return self._decode(np.array([token]))

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        ids = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        batch = self._llama.llama_batch_get_one(ids, len(tokens))
        if status := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens returned {status}")
        return np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._context, -1), (self.vocabulary,))

    def close(self) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def _quiet() -> None:
    """Errors only."""
    import llama_cpp

    global _log
    _log = llama_cpp.llama_log_callback(_logged)
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


def _logged(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR; it warns at every load that tokens have no texts
        import sys

        sys.stderr.write(text.decode(errors="replace"))


_log: Any = None  # the callback must live as long as llama.cpp may call it
