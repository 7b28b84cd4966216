"""Run an artifact: continue a prompt, answer it as a chat, or print the vector of a text (encoders).

The prompt may come from standard input. End-of-text tokens stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.cli.options import add_device, add_dtype, not_negative, positive
from qcompiler.errors import InputError, UsageError

if TYPE_CHECKING:
    from qcompiler.runtime.artifact import Artifact
    from qcompiler.runtime.generate import Stats
    from qcompiler.runtime.session import Session

NAME = "run"
HELP = "run an artifact on a prompt"

# Without --max-tokens: a page of text, and less where the context ends sooner.
DEFAULT_TOKENS = 256

# Files up to this size are checked at every start (tens of milliseconds); larger ones with --verify.
CHECKED_BYTES = 64 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("prompt", nargs="?", help="the text; from standard input when it is left out or `-`")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help=f"at most so many (default: {DEFAULT_TOKENS})")
    parser.add_argument("--temperature", type=not_negative, metavar="T", default=0.0, help="0 (default): the likeliest")
    parser.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest only")
    parser.add_argument("--top-p", type=not_negative, metavar="P", help="draw from the likeliest that reach P together")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--begin", metavar="TEXT", help="what the text of an encoder-decoder begins with")
    parser.add_argument("--chat", action="store_true", help="apply the checkpoint's chat template to the prompt")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads inside an operator")
    add_device(parser, "where to run an artifact of target torch")
    add_dtype(parser)
    parser.add_argument("--verify", action="store_true", help="check every file first, however large")
    parser.add_argument("--portable", action="store_true", help="run without the op library: same results, slowly")


def execute(options: argparse.Namespace) -> int:
    from qcompiler.runtime.artifact import open_artifact
    from qcompiler.runtime.session import Session

    artifact = open_artifact(options.directory)
    options.prompt = _prompt(options.prompt)
    _check(artifact, options.verify)
    session = Session(artifact, threads=options.threads, portable=options.portable, device=options.device, dtype=options.dtype)
    if artifact.kind in ("decoder", "encoder-decoder"):
        _generate(session, options)
    elif artifact.kind == "encoder":
        print(json.dumps(_vector(session, options.prompt)))
    else:
        inputs = ", ".join(f"{info.name} ({info.dtype})" for info in artifact.inputs)
        raise UsageError(
            f"{artifact.path} takes arrays, not text ({inputs}); call it from Python: qcompiler.Session(…).run(…)"
        )
    return 0


def _check(artifact: Artifact, everything: bool) -> None:
    from qcompiler.cli.verify import check_files, verify

    if everything:
        verify(artifact.path)
    else:
        check_files(artifact, CHECKED_BYTES)


def _prompt(given: str | None) -> str:
    """The prompt, from the command line or standard input (without the newline that ends it)."""
    if given is not None and given != "-":
        return given
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError('no prompt: give one (`qcompiler run DIR "…"`), or pipe it in')
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 text (byte {error.start})") from error


def _generate(session: Session, options: argparse.Namespace) -> None:
    from qcompiler.runtime.generate import generate

    prompt = options.prompt
    if options.chat:
        from qcompiler.runtime.chat import render

        prompt = render(session.artifact, [{"role": "user", "content": prompt}])
    bounded = options.max_tokens is not None or session.artifact.room is None
    generation = generate(
        session,
        prompt,
        max_tokens=(options.max_tokens or DEFAULT_TOKENS) if bounded else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        special=not options.chat,
        begin=options.begin,
    )
    for token in itertools.islice(generation, None if bounded else DEFAULT_TOKENS):
        sys.stdout.write(token.text)
        sys.stdout.flush()
    generation.close()
    sys.stdout.write("\n")
    if not options.quiet:
        _say_speed(generation.stats)


def _say_speed(stats: Stats) -> None:
    print(
        f"[{stats.prompt_tokens} prompt tokens at {stats.prefill_tokens_per_second:.1f}/s, "
        f"{stats.tokens} tokens at {stats.decode_tokens_per_second:.1f}/s]",
        file=sys.stderr,
    )


def _vector(session: Session, text: str) -> list[float]:
    """The pooled output where the model has one, else the mean of the last hidden states."""
    import numpy as np

    from qcompiler.runtime.tokens import Tokenizer

    tokens = session.artifact.input("tokens")
    if tokens is None:
        raise UsageError(f"{session.artifact.path} takes no tokens; call it from Python: qcompiler.Session(…).run(…)")
    ids = np.array([Tokenizer(session.artifact).encode(text)], np.int64)
    if ids.size == 0:
        raise InputError("the prompt has no tokens")
    outputs = session.run(**{tokens.name: ids})
    pooled = [array for array in outputs.values() if array.ndim == 2 and array.shape[0] == 1]
    hidden = [array for array in outputs.values() if array.ndim == 3 and array.shape[:2] == ids.shape]
    if not pooled and not hidden:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        raise InputError(f"{session.artifact.path} has no output that is a vector of the text: {shapes}")
    vector = pooled[0][0] if pooled else hidden[0][0].mean(axis=0)
    return [float(value) for value in vector]
