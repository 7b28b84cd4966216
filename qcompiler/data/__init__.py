"""Files that are shipped inside the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def reference_model() -> Path:
    """Directory of the bundled reference language model: a Hugging Face checkpoint with its tokenizer (11 MB).

    The package must be unpacked on disk, as every installer does: weights are memory-mapped, not read from an archive.
    """
    return Path(str(files(__name__).joinpath("reference_lm")))
