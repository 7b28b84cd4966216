"""The command line in a process of its own: as users meet it, with streams, signals and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What the minimal install does not have. `None` in sys.modules makes an import fail as if it were absent.
COMPILE_ONLY = (
    "torch", "transformers", "rich", "pydantic", "click", "typer", "yaml", "onnx", "onnx_ir", "onnxscript",
    "safetensors", "jinja2",
)  # fmt: skip


def qcompiler(
    *arguments: object, stdin: str | None = "", without: tuple[str, ...] = (), cwd: Path | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `qcompiler …`; `without`: modules that cannot be imported; `before`: code to run first."""
    code = textwrap.dedent(before) + textwrap.dedent(f"""
        import sys
        sys.modules.update(dict.fromkeys({without!r}))
        from qcompiler.cli import main
        sys.exit(main())
    """)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """This environment, with the checkout importable."""
    return os.environ | {"PYTHONPATH": str(ROOT)}
