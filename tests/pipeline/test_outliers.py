"""A model with planted outlier channels: plain static int8 breaks it, and what was made for outliers brings it back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

import qcompiler
from qcompiler.evaluate.evaluation import evaluate
from tests.outliers import plant

WINDOWS = 12
# Fewer samples than the recipes ask for: the outliers are there in every token.
SAMPLES, LENGTH = 8, 256


def reference() -> Path:
    return Path(qcompiler.__file__).parent / "data" / "reference_lm"


def model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(reference(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers") / "model"
    changed = model()
    plant(changed)
    changed.save_pretrained(folder)
    for file in reference().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_planting_changes_channels_and_no_logit() -> None:
    plain, changed = model(), model()
    places = plant(changed, factor=64.0, features=3)
    assert len(places) == 4 * plain.config.num_hidden_layers and all(len(set(c)) == 3 for c in places.values())
    tokens = torch.randint(4096, (1, 40), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    for name, module in changed.named_modules():
        if name in places:
            module.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y[0].abs().amax(0)}))
    with torch.no_grad():
        found, expected = changed(tokens).logits, plain(tokens).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    for name, channels in places.items():
        rest = torch.ones_like(seen[name], dtype=torch.bool)
        rest[channels] = False
        assert float(seen[name][channels].min()) > 3 * float(seen[name][rest].median())


def perplexity(model_path: Path, recipe: str, folder: Path) -> tuple[float, float]:
    """Of the compiled model, and of the float one."""
    result = qcompiler.compile(model_path, output=folder / recipe, recipe=recipe, samples=SAMPLES, length=LENGTH)
    scores = evaluate(str(result.path), against=str(model_path), max_windows=WINDOWS)
    return scores["perplexity"], scores["against_perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, low, high", [("int8-static", 1.5, 1e6), ("int8-smooth", 0.98, 1.02), ("int8-mixed", 0.98, 1.02)]
)
def test_what_outliers_do_to_int8(planted: Path, tmp_path: Path, recipe: str, low: float, high: float) -> None:
    found, expected = perplexity(planted, recipe, tmp_path)
    assert low < found / expected < high
