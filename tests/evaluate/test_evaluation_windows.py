from __future__ import annotations

import numpy as np
import pytest

from qcompiler.errors import UsageError
from qcompiler.evaluate.windows import Context, choose_context, cut


@pytest.mark.parametrize("prefix", [(), (900,), (900, 901)])
@pytest.mark.parametrize("suffix", [(), (990,)])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("n", [1, 5, 12, 13, 40])
def test_overlapping_windows_score_every_token_once(n, stride, prefix, suffix):
    ids = np.arange(n)
    size = 12 - len(prefix) - len(suffix)
    windows = list(cut(ids, 12, stride, prefix, suffix))
    scored = [int(t) for w in windows for t in w.labels]
    # Only a token that has nothing at all before it cannot be scored.
    assert scored == list(range(0 if prefix else 1, n))
    for w in windows:
        assert len(w.tokens) <= 12 and w.tokens.dtype == np.int64
        inner = w.tokens[len(prefix) : len(w.tokens) - len(suffix)]
        assert (inner == ids[w.start : w.start + size]).all()
        assert tuple(w.tokens[: len(prefix)]) == prefix and tuple(w.tokens[len(w.tokens) - len(suffix) :]) == suffix
    assert [w.index for w in windows] == list(range(len(windows)))
    # All but the first window have the context that the stride promises.
    assert all(w.first >= len(prefix) + size - stride for w in windows[1:])


def test_windows_without_overlap_lose_their_first_token():
    windows = list(cut(np.arange(100), 32))
    assert [len(w.tokens) for w in windows] == [32, 32, 32, 4]
    assert [w.labels.tolist() for w in windows][0] == list(range(1, 32))
    assert sum(len(w.labels) for w in windows) == 96


def test_a_prefix_lets_every_token_be_scored():
    windows = list(cut(np.arange(100), 33, prefix=(7,)))
    assert [t for w in windows for t in w.labels] == list(range(100))


def test_logits_and_labels_are_aligned():
    """The row that predicts a token is the one before it: logits that name the next token score perfectly."""
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    for stride in (None, 2):
        for w in cut(ids, 4, stride, prefix=(0,)):
            oracle = np.eye(10)[np.append(w.tokens[1:], 0)]
            assert (w.scored(oracle).argmax(1) == w.labels).all()


@pytest.mark.parametrize("stride", [0, -1, 33])
def test_bad_strides_are_refused(stride):
    with pytest.raises(UsageError, match=f"stride is {stride}, expected 1 to 32"):
        cut(np.arange(9), 32, stride)


def test_no_room_beside_the_special_tokens():
    with pytest.raises(UsageError, match="more than the 2 special tokens"):
        cut(np.arange(9), 2, prefix=(1,), suffix=(2,))


@pytest.mark.parametrize(
    ("config", "default"),
    [
        ({"training_context": 256, "max_position_embeddings": 1024}, 256),
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": 131072}, 2048),
        ({"n_positions": 128}, 128),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"training_context": 4096, "max_position_embeddings": 1024}, 1024),
        ({}, None),
    ],
)
def test_default_context(config, default):
    assert Context.of_config(config).default == default


def test_choice_of_context():
    small, large, unknown = Context(None, 128), Context(256, 1024), Context()
    assert choose_context(None, [large, unknown]) == 256
    assert choose_context(None, [large, small]) == 128
    assert choose_context(None, [unknown]) == 512
    assert choose_context(1000, [large]) == 1000
    assert Context(None, 514).within(512).default == 512
    for asked in (1, 1025):
        with pytest.raises(UsageError, match="expected 2 to 1024"):
            choose_context(asked, [large])
