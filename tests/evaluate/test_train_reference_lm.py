"""The training script: minutes of a small machine's time, so slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.evaluate.tokens import load_tokens

TOOLS = Path(__file__).parents[2] / "tools"

# Runs the script; with a number, the machine asks it to stop after so many steps.
RUN = """
import signal, sys
sys.path.insert(0, sys.argv.pop(1))
stop_after = int(sys.argv.pop(1))
import torch
torch.set_num_threads(1)
import train_reference_lm as script
loss_of, calls = script.loss_of, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == stop_after:
        signal.raise_signal(signal.SIGTERM)
    return loss_of(*arguments)
script.loss_of = counted
sys.exit(script.main())
"""


def _train(out: Path, *options: str, stop_after: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(TOOLS), str(stop_after), "--out", str(out), "--smoke", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_training_learns_and_resumes(tmp_path):
    whole = _train(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    figures = json.loads(whole.stdout)
    assert figures["last_loss"] < figures["first_loss"] - 0.3
    assert figures["held_out_perplexity"] < 400  # of 512 tokens
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["training_context"] == 64
    tokens = load_tokens(tmp_path / "whole")
    assert tokens.size == 512 and tokens.prefix == ()

    stopped = _train(tmp_path / "parts", stop_after=20)
    assert stopped.returncode == 75 and "stopped at step 20" in stopped.stderr
    other = _train(tmp_path / "parts", "--seed", "5")
    assert other.returncode == 1 and "another seed" in other.stderr
    resumed = _train(tmp_path / "parts")
    assert resumed.returncode == 0 and "resumed at step 20" in resumed.stderr
    same = ("steps", "first_loss", "last_loss", "held_out_perplexity", "evaluation_perplexity")
    assert {k: json.loads(resumed.stdout)[k] for k in same} == pytest.approx({k: figures[k] for k in same})

    again = _train(tmp_path / "whole")
    assert again.returncode == 1 and "choose another --out" in again.stderr


def test_manual_pages_become_plain_text(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from reference_corpus import plain_manual

    source = (
        '.\\" a comment\n.TH LS 1\n.SH NAME\nls \\- list\n.PP\n.BR cat (1)\nSee \\fBmore\\fP, \\(lqthis\\(rq.\n.nf\n'
    )
    assert plain_manual(source) == 'NAME\nls - list\n\ncat(1)\nSee more, "this".'


def test_the_evaluation_text_is_no_training_text(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from pydoc_data.topics import topics

    from reference_corpus import _evaluation_lines, _shares_lines, gather

    lines = _evaluation_lines()
    assert _shares_lines(topics["yield"], lines)
    training, held_out = gather(0.5, 0)
    assert 0.5e6 <= sum(map(len, training + held_out)) < 1e6
    assert not any(_shares_lines(document, lines) for document in training + held_out)
    assert gather(0.5, 0) == (training, held_out)
