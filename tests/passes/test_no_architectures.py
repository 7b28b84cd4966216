"""The passes know graphs: a name of an architecture under `passes/` would mean that one looks at something else."""

from __future__ import annotations

import re
from pathlib import Path

PASSES = Path(__file__).resolve().parents[2] / "passes"
NAMES = re.compile(
    r"llama|qwen|gemma|\bphi\b|phi\d|mistral|mixtral|gpt|bert|bloom|falcon|deepseek|\bt5\b|\bopt\b|\bmpt\b", re.I
)


def test_no_name_of_an_architecture_appears_under_passes() -> None:
    files = sorted(PASSES.rglob("*.py"))
    assert len(files) > 10
    # A method of quantization may carry three of these letters: gptq, gptvq, gptaq.
    lines = [
        f"{file.relative_to(PASSES)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if NAMES.search(re.sub(r"gpt([va]?)q", "", line, flags=re.I))
    ]
    assert lines == []
