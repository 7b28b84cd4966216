"""Reading an artifact: its manifest, checked before anything in it is used.

The manifest may come from anywhere, so nothing in it is trusted: every name must be a plain path inside the directory,
and what is said about files is compared with the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qcompiler.artifact.manifest import seal_holds
from qcompiler.errors import GateError, InputError, UnsupportedError

FORMAT = "qcompiler-artifact"
SCHEMA = 1
MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 100 * 2**20
TARGETS = ("onnx", "onnx-stock", "torch")
KINDS = ("decoder", "encoder", "encoder-decoder", "module")
# What the exporters call a tensor says what it is; a manifest may leave the role out for these.
_ROLE_OF_NAME = {
    "input_ids": "tokens",
    "decoder_input_ids": "decoder_tokens",
    "position_ids": "positions",
    "attention_mask": "mask",
    "token_type_ids": "token_types",
    "past_length": "past_length",
    "logits_to_keep": "logits_to_keep",
    "logits": "logits",
}


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of the graph.

    `shape` holds numbers and, for free axes, names. `role` says what an input is for: `tokens`, `decoder_tokens`,
    `positions`, `mask`, `token_types`, `past_length`, `logits_to_keep`, `past_key`, `past_value`, `past_state` or `other`;
    what an output is: `logits`, `hidden`, `pooled`, `present_key`, `present_value`, `present_state` or `other`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str = "other"


@dataclass(frozen=True)
class CacheLayer:
    """One layer's cache: tensors `[1, heads, length, head_dim]` of `dtype`, by their graph names."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True)
class CacheState:
    """Another tensor of a layer's cache, by its graph names: zeros before the first token, replaced by every step.

    One axis of it may be free: that one is empty at first, and grows.
    """

    past: str
    present: str


@dataclass(frozen=True)
class CacheInfo:
    """How the cache works: `kind` is `shared`, `growing` or `state` (no layer has keys and values).

    `past_length` names the input of a shared one; `step` is the most tokens that a run takes, None for any number.
    """

    kind: str
    past_length: str | None
    layers: tuple[CacheLayer, ...]
    states: tuple[CacheState, ...] = ()
    step: int | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Past and present names of every tensor: keys and values of each layer in turn, then the states."""
        pairs = []
        for layer in self.layers:
            pairs += [(layer.past_key, layer.present_key), (layer.past_value, layer.present_value)]
        return pairs + [(state.past, state.present) for state in self.states]


@dataclass(frozen=True)
class FixedLength:
    """A graph of one length: a text of fewer than `tokens` is filled up behind its end with `filler`.

    `outputs`: of every output that has an axis of the text's length, which axis that is. `exact`: whether filling up changes
    nothing of what the model computes of the text.
    """

    tokens: int
    filler: int
    outputs: Mapping[str, int]
    exact: bool


@dataclass(frozen=True)
class FileInfo:
    """What the manifest says about a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A directory that `qcompiler compile` wrote, opened and checked.

    Attributes:
        path: the directory.
        target: `onnx` (needs the op library), `onnx-stock` (does not) or `torch`.
        kind: `decoder`, `encoder`, `encoder-decoder` or `module`.
        entry: name of the graph's file.
        cache: None for a model without one.
        bos, eos, pad: token ids; `eos` has every id that ends a text, and may be empty.
        context: the longest sequence that the model was made for, None where that is not known.
        shortest, longest: the texts that the graph computes rightly; None for any length.
        fixed: the one length that the graph takes; None where it takes more.
        whole_text: why a decoder has no cache; None where it has one.
        causal: whether the logits of a decoder predict after every token, and not after the last one alone.
        decoder_start: what an encoder-decoder's decoder begins with: a token id or, where a first one is forced, two.
        never: token ids that no generated text has.
        manifest: the whole manifest, as read.
    """

    path: Path
    target: str
    kind: str
    entry: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    cache: CacheInfo | None
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    context: int | None
    shortest: int
    longest: int | None
    fixed: FixedLength | None
    whole_text: str | None
    causal: bool
    decoder_start: tuple[int, ...]
    never: tuple[int, ...]
    layout_version: int
    files: Mapping[str, FileInfo]
    manifest: Mapping[str, Any] = field(repr=False)

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists. Raises `InputError` for any other name."""
        if name not in self.files:
            raise InputError(f"{self.path}: the manifest lists no file {name!r}")
        return self.path / name

    @property
    def room(self) -> int | None:
        """The longest text that it takes: the model's context, or less where the graph takes less; None where unknown."""
        return min((most for most in (self.context, self.longest) if most is not None), default=None)

    def input(self, role: str) -> TensorInfo | None:
        """The input with that role, or None."""
        return next((info for info in self.inputs if info.role == role), None)


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check the artifact in the directory `path`.

    Every file that the manifest lists must be there with the size it states; contents are not read (`verify_files`).

    Raises:
        InputError: no such directory, not an artifact, or a manifest that cannot be read or names a path outside.
        UnsupportedError: written by a newer qcompiler.
        GateError: a listed file is missing or has another size.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {found}; expected the directory that `qcompiler compile` wrote")
    source = root / MANIFEST
    if not source.is_file():
        raise InputError(f"{root} is not an artifact: it has no {MANIFEST} (a compile that was stopped leaves none)")
    try:
        if source.is_symlink() or source.stat().st_size > _MANIFEST_LIMIT:
            raise ValueError("it is a link, or far larger than any manifest")
        manifest = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be read as JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        claimed = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"{source}: format is {claimed!r}, expected {FORMAT!r}; this is not an artifact of qcompiler")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise InputError(f"{source}: schema is {schema!r}, expected a number from 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise UnsupportedError(
            f"{source} has schema {schema}, this qcompiler reads up to {SCHEMA}; it was written by qcompiler "
            f"{manifest.get('qcompiler', 'of a later version')}: install that or a newer one"
        )
    artifact = _Reader(source, manifest).artifact(root)
    _check_files(artifact)
    return artifact


def verify_files(artifact: Artifact) -> int:
    """Compare every file with the size and SHA-256 in the manifest, and the manifest with its own; how many were read.

    Files are read in pieces, so memory stays small. Raises `GateError` naming every file that is missing, differs, or
    is there without being listed.
    """
    wrong = []
    if not seal_holds(artifact.path / MANIFEST):
        wrong.append(f"{MANIFEST} was changed: its own SHA-256 does not fit it")
    for name, info in sorted(artifact.files.items()):
        problem = _file_problem(artifact.path, name, info)
        if problem is None and (digest := _sha256(artifact.path / name)) != info.sha256.lower():
            problem = f"{name} is damaged: SHA-256 {digest[:16]}…, the manifest says {info.sha256[:16]}…"
        if problem is not None:
            wrong.append(problem)
    listed = {*artifact.files, MANIFEST}
    wrong.extend(f"{name} is not in the manifest" for name in _names_below(artifact.path) if name not in listed)
    if wrong:
        raise GateError(f"{artifact.path}: {len(wrong)} of its files are not as they were written: " + "; ".join(wrong))
    return len(artifact.files)


def _names_below(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        # A link to a folder is listed, not walked.
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *linked]):
            names.append(Path(folder, name).relative_to(root).as_posix())
    return names


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(artifact: Artifact) -> None:
    wrong = [p for name, info in artifact.files.items() if (p := _file_problem(artifact.path, name, info)) is not None]
    if wrong:
        raise GateError(f"{artifact.path} is incomplete: " + "; ".join(wrong) + "; copy or compile it again")


def _file_problem(root: Path, name: str, info: FileInfo) -> str | None:
    part = root
    for piece in PurePosixPath(name).parts:
        part = part / piece
        if part.is_symlink():
            return f"{name} goes through a symbolic link, which could lead out of the artifact"
    if not part.is_file():
        return f"{name} is missing"
    if (size := part.stat().st_size) != info.bytes:
        return f"{name} has {size} bytes, the manifest says {info.bytes}"
    return None


def is_plain_name(name: object) -> bool:
    """Whether `name` is a relative path that stays below its directory on every system, in its one normal spelling."""
    if not isinstance(name, str) or not name or any(c in name for c in '\\:*?"<>|') or not name.isprintable():
        return False
    return not name.startswith("/") and all(part not in ("", ".", "..") for part in name.split("/"))


class _Reader:
    """The manifest's fields, each checked; an error names the field, what was found and what was expected."""

    def __init__(self, source: Path, manifest: dict[str, Any]) -> None:
        self.source, self.manifest = source, manifest

    def artifact(self, root: Path) -> Artifact:
        manifest = self.manifest
        files = {
            self.name(name, "files"): FileInfo(
                self.number(self.table(info, f"files[{name}]").get("bytes"), f"files[{name}].bytes"),
                self.text(info.get("sha256"), f"files[{name}].sha256"),
            )
            for name, info in self.table(manifest.get("files"), "files").items()
        }
        entry = self.name(manifest.get("entry"), "entry")
        if entry not in files:
            self.fail("entry", entry, "a name listed under `files`")
        cache = manifest.get("cache")
        cache = None if cache is None else self.cache(self.table(cache, "cache"))
        tokens = self.table(manifest.get("tokens") or {}, "tokens")
        whole = manifest.get("whole_text")
        whole = None if whole is None else self.table(whole, "whole_text")
        eos = tokens.get("eos")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return Artifact(
            path=root,
            target=self.choice(manifest.get("target"), "target", TARGETS),
            kind=self.choice(manifest.get("kind"), "kind", KINDS),
            entry=entry,
            inputs=self.tensors("inputs", cache),
            outputs=self.tensors("outputs", None),
            cache=cache,
            bos=self.optional(tokens.get("bos"), "tokens.bos"),
            eos=tuple(self.number(token, "tokens.eos") for token in eos),
            pad=self.optional(tokens.get("pad"), "tokens.pad"),
            context=self.optional(manifest.get("context"), "context"),
            shortest=self.number(manifest.get("shortest", 1), "shortest"),
            longest=self.optional(manifest.get("longest"), "longest"),
            fixed=None if manifest.get("fixed_length") is None else self.fixed(manifest["fixed_length"]),
            whole_text=None if whole is None else self.text(whole.get("reason"), "whole_text.reason"),
            causal=whole is None or whole.get("causal") is not False,
            decoder_start=tuple(self.number(token, "tokens.decoder_start") for token in tokens.get("decoder_start") or ()),
            never=tuple(self.number(token, "tokens.never") for token in tokens.get("never") or ()),
            layout_version=self.number(manifest.get("layout_version", 1), "layout_version"),
            files=files,
            manifest=manifest,
        )

    def tensors(self, key: str, cache: CacheInfo | None) -> tuple[TensorInfo, ...]:
        roles = dict(_ROLE_OF_NAME)
        for layer in cache.layers if cache is not None else ():
            roles |= {layer.past_key: "past_key", layer.past_value: "past_value"}
        roles |= {state.past: "past_state" for state in (cache.states if cache is not None else ())}
        if cache is not None and cache.past_length is not None:
            roles[cache.past_length] = "past_length"
        infos = []
        for index, item in enumerate(self.sequence(self.manifest.get(key), key)):
            at = f"{key}[{index}]"
            name = self.text(self.table(item, at).get("name"), f"{at}.name")
            role = self.text(item.get("role", "other"), f"{at}.role")
            role = roles.get(name, "other") if role == "other" else role
            shape = tuple(self.sequence(item.get("shape"), f"{at}.shape"))
            if not all(isinstance(dim, (int, str)) for dim in shape):
                self.fail(f"{at}.shape", shape, "numbers and names")
            infos.append(TensorInfo(name, self.text(item.get("dtype"), f"{at}.dtype"), shape, role))
        return tuple(infos)

    def fixed(self, value: Any) -> FixedLength:
        table = self.table(value, "fixed_length")
        outputs = self.table(table.get("outputs"), "fixed_length.outputs")
        return FixedLength(
            tokens=self.number(table.get("tokens"), "fixed_length.tokens"),
            filler=self.number(table.get("filler"), "fixed_length.filler"),
            outputs={name: self.number(axis, f"fixed_length.outputs.{name}") for name, axis in outputs.items()},
            exact=table.get("exact") is True,
        )

    def cache(self, table: dict[str, Any]) -> CacheInfo:
        kind = self.choice(table.get("kind"), "cache.kind", ("shared", "growing", "state"))
        past_length = table.get("past_length")
        if kind == "shared":
            past_length = self.text(past_length, "cache.past_length")
        layers = []
        for index, item in enumerate(self.sequence(table.get("layers"), "cache.layers")):
            at = f"cache.layers[{index}]"
            item = self.table(item, at)
            layers.append(
                CacheLayer(
                    past_key=self.text(item.get("past_key"), f"{at}.past_key"),
                    past_value=self.text(item.get("past_value"), f"{at}.past_value"),
                    present_key=self.text(item.get("present_key"), f"{at}.present_key"),
                    present_value=self.text(item.get("present_value"), f"{at}.present_value"),
                    heads=self.number(item.get("heads"), f"{at}.heads"),
                    head_dim=self.number(item.get("head_dim"), f"{at}.head_dim"),
                    dtype=self.text(item.get("dtype"), f"{at}.dtype"),
                )
            )
        step = self.optional(table.get("step"), "cache.step")
        if step == 0:
            self.fail("cache.step", step, "a number, 1 or more")
        states = []
        for index, item in enumerate(self.sequence(table.get("states", []), "cache.states")):
            at = f"cache.states[{index}]"
            item = self.table(item, at)
            states.append(CacheState(*(self.text(item.get(key), f"{at}.{key}") for key in ("past", "present"))))
        return CacheInfo(kind, past_length, tuple(layers), tuple(states), step)

    def fail(self, key: str, found: object, expected: str) -> None:
        raise InputError(f"{self.source}: {key} is {found!r}, expected {expected}")

    def name(self, value: object, key: str) -> str:
        if not is_plain_name(value):
            self.fail(key, value, "a plain relative path inside the artifact")
        return str(value)

    def text(self, value: object, key: str) -> str:
        if not isinstance(value, str):
            self.fail(key, value, "a text")
        return str(value)

    def number(self, value: Any, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.fail(key, value, "a number, 0 or more")
        return int(value)

    def optional(self, value: Any, key: str) -> int | None:
        return None if value is None else self.number(value, key)

    def choice(self, value: Any, key: str, choices: tuple[str, ...]) -> str:
        if value not in choices:
            self.fail(key, value, "one of " + ", ".join(choices))
        return str(value)

    def table(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(key, value, "an object")
        return dict(value)

    def sequence(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list):
            self.fail(key, value, "a list")
        return list(value)
