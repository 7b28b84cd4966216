"""Solved sites as content-addressed files: a run that was killed finds them again and gives the same bytes.

A file's name is a hash of everything that its content follows from: the graph, the weights, the samples, the recipe, the
versions, and the pass and site. It is written aside, synced and renamed, so a file that has its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qcompiler.graph.mapped import memory
from qcompiler.graph.text import graph_text
from qcompiler.sweep.place import CPU

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context

_RECORD = "record"
_SHARE = 2**24


class SolvedStore:
    """Tensors and a record by key, in one folder.

    Args:
        folder: exists; belongs to this compile alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._fingerprint: str | None = None
        self.found = 0

    def key(self, graph: Graph, context: Context, *parts: object) -> str:
        """The name of what follows from this compile's inputs and `parts` (pass, options, site)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(graph, context)
        return hashlib.sha256("\0".join([self._fingerprint, *map(str, parts)]).encode()).hexdigest()

    def get(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was stored, its tensors mapped from the file; None when there is nothing (or it is damaged)."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                record = json.loads(file.metadata()[_RECORD])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, TypeError):
            path.unlink()
            return None
        self.found += 1
        return tensors, record

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Store; the tensors come back mapped from the file."""
        path = self._path(key)
        aside = path.with_suffix(".partial")
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(aside), {_RECORD: json.dumps(record, sort_keys=True)})
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def fingerprint(graph: Graph, context: Context) -> str:
    """A hash of what decides a compile: graph, constants, samples, recipe, versions, threads."""
    from qcompiler import recipe as recipes
    from qcompiler.artifact.manifest import version

    digest = hashlib.sha256()
    described = [graph_text(graph.module), recipes.to_yaml(context.recipe), version(), torch.__version__]
    # The number of threads decides how BLAS splits its sums.
    place = [] if context.device == CPU else [torch.device(context.device).type]
    for text in [*described, str(torch.get_num_threads()), *place]:
        digest.update(text.encode() + b"\0")
    seen: set[int] = set()
    for name in sorted({str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"}):
        tensor = graph.stored(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.untyped_storage().data_ptr() not in seen:  # a tied weight is read once
            seen.add(tensor.untyped_storage().data_ptr())
            _add(digest, tensor)
    for leaf in (leaf for sample in context.samples() for leaf in torch.utils._pytree.tree_leaves(sample)):
        _add(digest, leaf) if isinstance(leaf, torch.Tensor) else digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _add(digest: Any, tensor: torch.Tensor) -> None:
    """Hash the tensor's bytes in pieces: nothing of its size is held."""
    flat = tensor.detach().contiguous().reshape(-1)
    for start in range(0, flat.numel(), _SHARE):
        digest.update(memory(flat[start : start + _SHARE]))
