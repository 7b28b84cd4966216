"""Generation: the same tokens as the model in torch, streamed text, stops, limits, interruption."""

from __future__ import annotations

import torch

from qcompiler.runtime.generate import generate
from qcompiler.runtime.session import Session
from tests.artifacts import reference_artifact, reference_model

PROMPT = "Python is a programming language that"


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What transformers generates greedily."""
    with torch.no_grad():
        output = reference_model().generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers() -> None:
    for kind in ("shared", "growing"):
        session = Session(reference_artifact(kind), capacity=32)
        generation = generate(session, PROMPT, max_tokens=48)
        tokens = [token.id for token in generation]
        prompt = list(generation._prompt)
        assert tokens == expected_tokens(prompt, 48)
        assert generation.text
