"""OpenVINO: the checkpoint as a stateful model of its own operators, weights compressed by nncf, run by the CPU plugin.

The graph is what `optimum-intel` exports for a Llama: keys and values in variables (ReadValue, Assign), reordered by
`beam_idx`, so that the plugin joins them with the attention; root mean square norms and rotations in the forms that it fuses.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.artifacts import Facts, kept, source_key
from tools.bench.decode_engines import Skip, llama_configuration, weights

GROUP = 128  # of int4, nncf's own default
VARIANTS = ("float16", "int8", "int4")
# `int4-dq128`: activations quantized to int8 in groups of 128, as ours are; the plugin's default is 32.
SUFFIX = "-dq"


def prepare(source: str, label: str, variant: str, work: Path, again: bool) -> Facts:
    """The checkpoint as IR: `int4` is INT4_SYM in groups of 128 with head and lookup in int8, `int8` INT8_ASYM a channel."""
    weight, _, group = variant.partition(SUFFIX)
    if weight not in VARIANTS or (SUFFIX in variant and not group.isdigit()):
        raise Skip(f"{variant} is none of {', '.join(VARIANTS)}, with {SUFFIX}N or without")
    key = {"source": source_key(source), "variant": variant, "openvino": _version("openvino")}
    if weight != "float16":
        if importlib.util.find_spec("nncf") is None:
            raise Skip("nncf not installed, which compresses the weights")
        key |= {"nncf": _version("nncf")}
    llama_configuration(source)
    return kept(work / f"{label}-{variant}-openvino", key, write, source, weight, int(group or 0), again=again)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def write(path: Path, source: str, variant: str, group: int = 0) -> Facts:
    """`model.xml`, `model.bin` and the plugin's properties in the folder `path`; `group`: of activations, 0 is the default's."""
    import openvino

    model = Llama(llama_configuration(source), weights(source)).model()
    if variant != "float16":
        import nncf

        mode = nncf.CompressWeightsMode
        chosen = {"mode": mode.INT4_SYM, "group_size": GROUP, "ratio": 1.0} if variant == "int4" else {"mode": mode.INT8_ASYM}
        model = nncf.compress_weights(model, **chosen)
    path.mkdir()
    openvino.save_model(model, path / "model.xml", compress_to_fp16=False)
    properties = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group} if group else {}
    (path / "properties.json").write_text(json.dumps(properties))
    sizes = [(path / name).stat().st_size for name in ("model.xml", "model.bin")]
    return {"file_bytes": sum(sizes), "bytes_a_token": read_a_token(model), "data": "model.bin"}


def read_a_token(model: Any) -> int:
    """Bytes of the constants behind the weights of every product, each once."""
    found: dict[str, int] = {}
    for product in (op for op in model.get_ops() if op.get_type_name() == "MatMul"):
        pending = [product.input_value(1).get_node()]
        while pending:
            node = pending.pop()
            if node.get_type_name() == "Constant":
                # OpenVINO counts whole elements only in `byte_size` of its own tensor, which packs two of four bits a byte.
                found[node.get_friendly_name()] = node.get_byte_size()
            else:
                pending += [value.get_node() for value in node.input_values()]
    return sum(found.values())


def _integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Llama:
    """Builds the graph. `[batch, length, heads, width]` and so on stand for shapes; batch is 1 wherever it runs."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Any]) -> None:
        from openvino import opset13

        self._op: Any = opset13
        self._config, self._tensors = config, tensors
        self._states: list[Any] = []
        inputs = {"input_ids": np.int64, "position_ids": np.int64}
        self._inputs = {name: opset13.parameter([-1, -1], dtype, name=name) for name, dtype in inputs.items()}
        self._inputs["beam_idx"] = opset13.parameter([-1], np.int32, name="beam_idx")

    def model(self) -> Any:
        """Inputs input_ids, position_ids [1, length] int64 and beam_idx [1] int32; output logits [1, 1, vocabulary]."""
        import openvino

        op, layers = self._op, self._config["num_hidden_layers"]
        table = self._weight("model.embed_tokens")
        hidden = op.gather(table, op.convert(self._inputs["input_ids"], "i32"), np.int32(0))
        self._rotations()
        for index in range(layers):
            layer = f"model.layers.{index}"
            normed = self._norm(hidden, f"{layer}.input_layernorm")
            hidden = op.add(hidden, self._attention(normed, f"{layer}.self_attn", index))
            normed = self._norm(hidden, f"{layer}.post_attention_layernorm")
            gate, up = (self._linear(normed, f"{layer}.mlp.{part}_proj") for part in ("gate", "up"))
            hidden = op.add(hidden, self._linear(op.multiply(op.swish(gate), up), f"{layer}.mlp.down_proj"))
        last = op.slice(hidden, _integers(-1), _integers(2**31 - 1), _integers(1), _integers(1))
        last = self._norm(last, "model.norm")
        tied = self._config["tie_word_embeddings"]
        logits = op.matmul(last, table, False, True) if tied else self._linear(last, "lm_head")
        result = op.result(logits)
        result.output(0).set_names({"logits"})
        for name, node in self._inputs.items():
            node.output(0).set_names({name})
        return openvino.Model([result], self._states, list(self._inputs.values()), "llama")

    def _weight(self, name: str) -> Any:
        """A matrix, stored in float16 and computed with in float32, as every exported model has it."""
        import openvino

        array = self._tensors[f"{name}.weight"].half().numpy()
        constant = self._op.constant(openvino.Tensor(array), name=f"{name}.weight")
        return self._op.convert(constant, "f32")

    def _linear(self, x: Any, name: str) -> Any:
        return self._op.matmul(x, self._weight(name), False, True)

    def _norm(self, x: Any, name: str) -> Any:
        op = self._op
        mean = op.reduce_mean(op.power(x, np.float32(2)), _integers(-1), True)
        root = op.sqrt(op.add(mean, np.float32(self._config["rms_norm_eps"])))
        scaled = op.multiply(x, op.divide(np.float32(1), root))
        return op.multiply(scaled, op.constant(self._tensors[f"{name}.weight"].float().numpy().reshape(1, 1, -1)))

    def _rotations(self) -> None:
        """Cosine and sine of every position [1, 1, length, width], and the batch [1]."""
        op, width = self._op, self._config["head_dim"]
        frequency = 1 / self._config["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
        positions = op.convert(op.unsqueeze(self._inputs["position_ids"], np.int64(1)), "f32")
        angle = op.matmul(op.constant(frequency.astype(np.float32).reshape(1, -1, 1)), positions, False, False)
        angle = op.transpose(angle, _integers(0, 2, 1))
        both = op.concat([angle, angle], -1)
        self._cos, self._sin = (op.unsqueeze(f(both), np.int64(1)) for f in (op.cos, op.sin))
        shape = op.shape_of(self._inputs["input_ids"])
        self._batch, self._length = (op.gather(shape, _integers(axis), np.int64(0)) for axis in (0, 1))
        self._mask: Any = None

    def _rotated(self, x: Any) -> Any:
        """`x` [batch, heads, length, width], its pairs (i, i + width / 2) turned by their angles."""
        op, half = self._op, self._config["head_dim"] // 2
        first, second = (
            op.slice(x, _integers(start), _integers(end), _integers(1), _integers(3))
            for start, end in ((0, half), (half, 2**31 - 1))
        )
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
        return op.add(op.multiply(x, self._cos), op.multiply(turned, self._sin))

    def _attention(self, x: Any, name: str, index: int) -> Any:
        op, config = self._op, self._config
        heads, kept, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        query, key, value = (
            op.transpose(
                op.reshape(self._linear(x, f"{name}.{part}_proj"), _integers(0, 0, count, width), True), _integers(0, 2, 1, 3)
            )
            for part, count in (("q", heads), ("k", kept), ("v", kept))
        )
        keys = self._remembered(self._rotated(key), f"past_key_values.{index}.key", kept, width)
        values = self._remembered(value, f"past_key_values.{index}.value", kept, width)
        if self._mask is None:
            self._mask = self._causal(keys)
        attended = op.scaled_dot_product_attention(
            self._rotated(query), self._repeated(keys), self._repeated(values), self._mask, causal=False
        )
        joined = op.reshape(op.transpose(attended, _integers(0, 2, 1, 3)), _integers(0, 0, heads * width), True)
        return self._linear(joined, f"{name}.o_proj")

    def _remembered(self, new: Any, name: str, heads: int, width: int) -> Any:
        """`new` [batch, heads, length, width] behind what the variable `name` holds."""
        import openvino
        from openvino.op.util import Variable, VariableInfo

        op, info = self._op, VariableInfo()
        info.data_shape = openvino.PartialShape([-1, heads, -1, width])
        info.data_type, info.variable_id = openvino.Type.f32, name
        variable = Variable(info)
        empty = op.concat([self._batch, _integers(heads), _integers(0), _integers(width)], 0)
        past = op.read_value(op.broadcast(np.float32(0), empty), variable)
        past = op.gather(past, self._inputs["beam_idx"], np.int64(0))
        both = op.concat([past, new], 2)
        self._states.append(op.assign(both, variable))
        return both

    def _repeated(self, x: Any) -> Any:
        """`x` [batch, kept heads, positions, width] with every head as often as queries share it."""
        op, config = self._op, self._config
        heads, kept, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        if heads == kept:
            return x
        apart = op.unsqueeze(x, np.int64(2))
        wide = op.broadcast(apart, _integers(1, 1, heads // kept, 1, 1), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, _integers(0, heads, -1, width), True)

    def _causal(self, keys: Any) -> Any:
        """[1, 1, length, positions]: 0 where a token sees a position, the lowest number where not."""
        op = self._op
        total = op.gather(op.shape_of(keys), np.int64(2), np.int64(0))
        length = op.squeeze(self._length, np.int64(0))
        rows = op.add(op.unsqueeze(op.range(np.int64(0), length, np.int64(1), "i64"), np.int64(1)), op.subtract(total, length))
        columns = op.unsqueeze(op.range(np.int64(0), total, np.int64(1), "i64"), np.int64(0))
        mask = op.select(op.less_equal(columns, rows), np.float32(0), np.float32(np.finfo(np.float32).min))
        return op.unsqueeze(mask, _integers(0, 1))


class Runner:
    """See `decode_engines.Engine`: the plugin's defaults for latency and the number of threads, beside what `write` noted."""

    def __init__(self, path: str, threads: int, capacity: int) -> None:
        import openvino

        properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        properties |= json.loads((Path(path) / "properties.json").read_text())
        self._compiled = openvino.Core().compile_model(Path(path) / "model.xml", "CPU", properties)
        self._request = self._compiled.create_infer_request()
        self.vocabulary = self._compiled.output("logits").partial_shape[2].get_length()
        self._beam, self._length = np.zeros(1, np.int32), 0

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._request.reset_state()
        self._length = 0
        return self._infer(tokens)

    def step(self, token: int) -> np.ndarray:
        return self._infer(np.array([token]))

    def _infer(self, tokens: np.ndarray) -> np.ndarray:
        positions = np.arange(self._length, self._length + len(tokens), dtype=np.int64)
        feeds = {"input_ids": tokens.astype(np.int64)[None], "position_ids": positions[None], "beam_idx": self._beam}
        found = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        self._length += len(tokens)
        return found[0].reshape(-1)

    def close(self) -> None:
        del self._request, self._compiled
