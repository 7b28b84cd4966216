"""A process for every side: libraries that do not meet, memory that is one side's alone, and what it takes measured.

The parent has `Worker`; `python -m tools.bench.decode_process` is the child. They speak JSON, a line each way.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tools.bench.decode_engines import KINDS, Engine, module

PAUSE = 0.05  # seconds in which threads stop spinning after what came before
WARM_UP = 4  # tokens
SAMPLE = 0.002  # seconds between two looks at a process's memory


class SideError(Exception):
    """What went wrong in a side's process."""


class Worker:
    """The process of one side, with its packages imported and no model open."""

    def __init__(self, kind: str, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.pid = self._process.pid
        self._kind, self._threads = kind, threads
        self._ask(do="import", kind=kind)

    def open(self, path: str, capacity: int) -> float:
        """Seconds until the model is ready to run."""
        return self._ask(do="open", kind=self._kind, path=path, threads=self._threads, capacity=capacity)["seconds"]

    def run(self, tokens: np.ndarray, past: int, new: int) -> dict[str, Any]:
        """Tokens a second of the prompt (`prefill`) and of `new` ones after `past` (`decode`), seconds of each of `steps`."""
        return self._ask(do="run", tokens=tokens.tolist(), past=past, new=new)

    def cosine(self, reference: Path) -> float:
        """The lower of two cosines with the reference's logits: after a prompt, and after tokens one by one."""
        return self._ask(do="check", reference=str(reference))["cosine"]

    def close(self) -> None:
        """Close the model; the process stays."""
        self._ask(do="close")

    def _ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"its process ended with status {self._process.wait()} at {what['do']!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.wait()
        self._process.stdout.close()


# ---- memory and processor time, of Linux only


def memory_of(kind: str, path: str, tokens: np.ndarray, threads: int) -> dict[str, int] | None:
    """What loading and running take, in a process of its own: bytes beyond what it had before it opened the model.

    Returns:
        `loaded_anonymous`: RssAnon when the model is open, `loading_anonymous`: its peak until then; `anonymous`: its peak
        until a prompt and some tokens have run; `resident`: the high-water mark of all pages, those of mapped files too.
        None where the system does not tell.
    """
    with Worker(kind, threads) as worker:
        before = _status(worker.pid)
        if before is None:
            return None
        with _Peak(worker.pid) as peak:
            worker.open(path, len(tokens) + WARM_UP)
            loaded, loading = _status(worker.pid), peak.bytes
            worker.run(tokens, WARM_UP, WARM_UP)
        after = _status(worker.pid)
        assert loaded is not None and after is not None
        loading = max(loading, loaded["RssAnon"])
        return {
            "loaded_anonymous": loaded["RssAnon"] - before["RssAnon"],
            "loading_anonymous": loading - before["RssAnon"],
            "anonymous": max(peak.bytes, loading, after["RssAnon"]) - before["RssAnon"],
            "resident": after["VmHWM"] - before["VmRSS"],
        }


class _Peak:
    """The most anonymous memory that a process has while this is open; looked at from outside, so nothing holds it up."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE):
            if (now := _status(self._pid)) is not None:
                self.bytes = max(self.bytes, now["RssAnon"])

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _status(pid: int) -> dict[str, int] | None:
    """The sizes in /proc/PID/status, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


def processor_seconds(pid: int) -> float:
    """What all threads of a process have used so far; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the child


def run(engine: Engine, tokens: np.ndarray, past: int, new: int) -> dict[str, Any]:
    """See `Worker.run`. A step is a greedy choice and the token's way through the model."""
    engine.prefill(tokens[:WARM_UP])
    for token in tokens[:WARM_UP]:
        engine.step(int(token))
    time.sleep(PAUSE)
    start = time.perf_counter()
    engine.prefill(tokens)
    prefill = len(tokens) / (time.perf_counter() - start)
    logits = engine.prefill(tokens[:past])
    steps = []
    for _ in range(new):
        start = time.perf_counter()
        logits = engine.step(int(np.argmax(logits)))
        steps.append(time.perf_counter() - start)
    return {"prefill": prefill, "decode": new / sum(steps), "steps": steps}


def check(engine: Engine, reference: Path) -> float:
    """See `Worker.cosine`. The file has `tokens` [n], `prompt` and the `logits` [2, vocabulary] after `prompt` and n tokens."""
    with np.load(reference) as known:
        tokens, prompt, logits = known["tokens"], int(known["prompt"]), known["logits"]
    found = [np.array(engine.prefill(tokens[:prompt]))]
    for token in tokens[prompt:]:
        last = engine.step(int(token))
    found.append(np.array(last))
    return min(_cosine(a, b) for a, b in zip(found, logits, strict=True))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _serve() -> int:
    """Answer the parent until it closes the pipe."""
    # What libraries print goes to the standard error; the parent reads nothing but answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        given = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            match given["do"]:
                case "import":
                    module(given["kind"])
                    importlib.import_module(KINDS[given["kind"]][1][0])
                case "open":
                    start = time.perf_counter()
                    engine = module(given["kind"]).Runner(given["path"], given["threads"], given["capacity"])
                    answer["seconds"] = time.perf_counter() - start
                case "run" if engine is not None:
                    answer |= run(engine, np.array(given["tokens"]), given["past"], given["new"])
                case "check" if engine is not None:
                    answer["cosine"] = check(engine, Path(given["reference"]))
                case "close" if engine is not None:
                    engine.close()
                    engine = None
                case other:
                    raise ValueError(f"{other!r} with {'a' if engine else 'no'} model open")
        except Exception as error:  # the parent decides what becomes of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_serve())
