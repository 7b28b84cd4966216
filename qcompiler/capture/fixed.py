"""Models whose own code holds the batch or the length of a text: a graph of one batch, of one length.

A shorter text is filled up behind its end. In a decoder whose later tokens change no earlier logits that changes nothing; in an
encoder the filling is masked, and whether that changes nothing is measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.dimensions import FixedAxis, limit_lengths, program_ports
from qcompiler.capture.encoder import prepare_encoder
from qcompiler.capture.export import export_torch, last_message
from qcompiler.capture.prepared import FixedLength, Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.unchanged import unchanged
from qcompiler.capture.whole import tokens
from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.evaluate.windows import Context
from qcompiler.pipeline.passes import Skip

# Relative to the largest output.
_SAME = 1e-3
_TOKENS = "input_ids"
# Length of a shorter trace that tells how a graph grows.
_SHORT = 7


def with_fixed_sizes(prepared: Prepared, model: PreTrainedModel, wanted: int | bool) -> Prepared:
    """`prepared` where its graph takes texts of `wanted` tokens (True: of the model's context); else one of fixed sizes.

    The batch is fixed, at 1, where the model's own code holds it, the length where that code holds the length. Only decoders
    without a cache and encoders are looked at.

    Raises:
        UsageError: `wanted` is beyond the model's context, or that is not known.
        UnsupportedError: texts shorter than a fixed length cannot be filled up.

    An encoder that computes something else of a text that is filled up is a fallback.
    """
    if prepared.kind != "encoder" and prepared.whole is None:
        return prepared
    length = fixed_length(model, prepared.description, wanted)
    for _ in ("batch", "length"):
        held, nodes = _held(prepared, length)
        if held == "batch":
            prepared = _one_row(prepared, model)
        elif held == "length":
            prepared = _of_one_length(prepared, model, length, nodes)
        if held is None or (prepared.fixed is not None and not prepared.axes[_TOKENS]):
            break
    return prepared


def _held(prepared: Prepared, length: int) -> tuple[str | None, int]:
    """The axis that keeps a graph from texts of `length` tokens, None where it takes them; and how many nodes a trace has that
    holds an axis, else 0.
    """
    trial = replace(prepared)  # what is found out of it is found out again when it is exported
    program = export_torch(trial, None, traced_only=True)
    try:
        limit_lengths(program.module(), trial)
        program_ports(program, trial)
    except FixedAxis as error:
        return error.name, len(program.graph.nodes)
    return None if trial.longest is None or trial.longest >= length else "length", 0


def fixed_length(model: PreTrainedModel, description: str, wanted: int | bool) -> int:
    """The number of tokens that is asked for, within the model's context."""
    context = Context.of_config(model.config).positions
    if wanted is True and context is None:
        raise UsageError(
            f"{description}: allow: {{fixed_length: true}} asks for the model's context, which is not known; give a number"
        )
    length = int(context if wanted is True and context is not None else wanted)
    if context is not None and length > context:
        raise UsageError(f"{description}: allow: {{fixed_length: {length}}} is beyond the model's context of {context} tokens")
    return length


def _one_row(prepared: Prepared, model: PreTrainedModel) -> Prepared:
    """An encoder of one text at a time."""
    length = None if prepared.fixed is None else prepared.fixed.tokens
    made = prepare_encoder(model, 1) if length is None else prepare_encoder(model, 1, length)
    axes = {path: {axis: name for axis, name in names.items() if name != "batch"} for path, names in prepared.axes.items()}
    notes = [*prepared.notes, "one text at a time: the model's own code holds the batch"]
    return replace(prepared, inputs=made.inputs, axes=axes, dynamic_shapes=_shapes(axes), notes=notes)


def _of_one_length(prepared: Prepared, model: PreTrainedModel, length: int, nodes: int) -> Prepared:
    """The same for texts of `length` tokens, and shorter ones that are filled up to it.

    Args:
        nodes: of the trace of `prepared`, where that holds the length.
    """
    growth = _growth(prepared, model, nodes) if nodes else 0.0
    made = _sized(prepared, model, length)
    filler = getattr(model.config.get_text_config(), "pad_token_id", None)
    filler = filler if isinstance(filler, int) and filler >= 0 and prepared.kind == "encoder" else 0
    outputs, changes = _filled(made, model, length, filler)
    if changes > _SAME and prepared.kind == "decoder":
        raise UnsupportedError(
            f"{prepared.description}: its own code holds the length of {_TOKENS}, and texts shorter than {length} tokens "
            f"cannot be filled up to it: what stands behind them changes their logits (by {changes:.2g} of the largest)"
        )
    made.fixed = FixedLength(length, filler, outputs, changes <= _SAME)
    made.shortest = made.longest = length
    said = "which changes nothing of what the model computes of them"
    if not made.fixed.exact:
        said = f"masked, which the model does not compute as it does them alone (it differs by {changes:.2g} of the largest)"
        made.fallbacks = [*made.fallbacks, Skip("length", f"texts shorter than {length} tokens are filled up and {said}")]
    made.notes = [
        *prepared.notes,
        f"texts of {length} tokens: the model's own code holds the length; shorter ones are filled up, {said}",
    ]
    if growth >= 1:
        made.notes.append(
            f"a loop over the tokens is unrolled: {growth:.0f} nodes for each, about {round(growth * length):,} for {length}"
        )
    return made


def _sized(prepared: Prepared, model: PreTrainedModel, length: int) -> Prepared:
    """Traced with `length` tokens, which no longer vary."""
    axes = {path: {axis: name for axis, name in names.items() if name != "length"} for path, names in prepared.axes.items()}
    if prepared.kind == "encoder":
        inputs = prepare_encoder(model, 2 if "batch" in axes[_TOKENS].values() else 1, length).inputs
    else:
        inputs = {_TOKENS: tokens(model, length)}
    return replace(prepared, inputs=inputs, axes=axes, dynamic_shapes=_shapes(axes), notes=list(prepared.notes))


def _shapes(axes: dict[str, dict[int, str]]) -> dict[str, dict[int, object]]:
    return {path: dict.fromkeys(names, torch.export.Dim.AUTO) for path, names in axes.items()}


def _growth(prepared: Prepared, model: PreTrainedModel, nodes: int) -> float:
    """How many nodes a trace grows by with each token; less than one is no loop over the tokens."""
    try:
        fewer = len(export_torch(_sized(prepared, model, _SHORT), None, traced_only=True).graph.nodes)
    except UnsupportedError:  # a text too short for the model says nothing of its graph
        return 0.0
    return (nodes - fewer) / (prepared.inputs[_TOKENS].shape[1] - _SHORT)


def _filled(made: Prepared, model: PreTrainedModel, length: int, filler: int) -> tuple[dict[str, int], float]:
    """The axis of every output that goes with the text, and how much filling a text up changes of it, of the largest."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedError(f"{made.description}: without weights it cannot be seen what filling texts up to {length} changes")
    axes: dict[str, int] = {}
    most = 0.0
    for part in sorted({max(length // 2, 1), length - 1}):
        given = {name: value[:1] for name, value in made.example().items()}
        short = {name: value[:, :part] for name, value in given.items()}
        given[_TOKENS][:, part:] = filler
        if "attention_mask" in given:
            given["attention_mask"][:] = (torch.arange(length) < part).to(given["attention_mask"].dtype)
            short["attention_mask"] = torch.ones_like(short["attention_mask"])
        try:
            with Quiet(), torch.no_grad(), unchanged(model):
                alone, filled = (get_leaf_tensors(made.module(**each, **made.switches)) for each in (short, given))
        except Exception as error:
            raise UnsupportedError(f"{made.description}: it cannot be run on {part} tokens: {last_message(error)}") from error
        for name, expected in alone.items():
            found = filled[name]
            for axis, size in enumerate(found.shape):
                if size != expected.shape[axis]:
                    axes[name] = axis
                    found = found.narrow(axis, 0, expected.shape[axis])
            most = max(most, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
    return axes, most
