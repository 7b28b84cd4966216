"""Comparisons: what is done again and what is not, recipes that fail, the Pareto set, the table. The model is tiny."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompiler import compiler
from qcompiler.cli import main
from qcompiler.compare import _mark, compare, pareto
from qcompiler.compare_store import Store, base_key, key
from qcompiler.errors import GateError, InputError, Stopped, UnsupportedError, UsageError
from qcompiler.evaluate import evaluation
from qcompiler.pipeline.instruments import HighestPeak, PeakMemory
from qcompiler.recipe import load as load_recipe
from qcompiler.report.compare import compare_document
from qcompiler.runtime import bench as benches
from tests.checkpoints import tiny_decoder, tiny_encoder
from tests.cli.process import ROOT
from tests.report import fake
from tests.report.test_reports import plain

REFUSED = "name: refused\nlinear: {bits: 4, group: 32}\noverrides:\n  - {select: {role: 'mlp.*'}, scheme: float}\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison for real: two recipes that work and one that its own gate refuses."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "refused.yaml").write_text(REFUSED)
    recipes = ["int8", folder / "refused.yaml", "int4"]
    result = compare(
        checkpoint, recipes, output=folder / "out", samples=1, length=16, context=32, max_windows=3, prompt_tokens=16,
        new_tokens=4, repeats=2, threads=1,
    )  # fmt: skip
    return folder / "out", result


def documented(title: str) -> Any:
    text = (ROOT / "docs" / "cli.md").read_text()
    return json.loads(re.search(rf"^## qcompiler {title} .*?```json\n(.*?)```", text, re.S | re.M)[1])


def test_rows(whole: tuple[Path, dict[str, Any]], checkpoint: Path) -> None:
    folder, result = whole
    int8, refused, int4 = result["rows"]
    assert [row["recipe"] for row in result["rows"]] == ["int8", "refused", "int4"]
    assert int8["bytes"] > int4["bytes"] and int8["bits_per_weight"] > int4["bits_per_weight"] > 4
    assert 0 < int8["kld_mean"] < int4["kld_mean"] and int8["same_top"] > int4["same_top"]
    for row in (int8, int4):
        assert row["error"] is None and row["directory"] == str(folder / row["recipe"])
        assert row["peak_rss_bytes"] > 2**26 and row["compile_seconds"] > 0
        assert len(row["decode_tokens_per_second"]["samples"]) == 2
        assert row["reused"] == {"compile": False, "evaluation": False, "speed": False}
        # as `eval` measures it alone
        alone = evaluation.evaluate(folder / row["recipe"], str(checkpoint), context=32, max_windows=3, threads=1)
        assert (row["perplexity"], row["kld_mean"], row["kld_p99"]) == (alone["perplexity"], alone["kld_mean"], alone["kld_p99"])
        assert result["float"]["perplexity"] == alone["against_perplexity"]
    assert refused["error"]["exit_code"] == 5 and "min_coverage" in refused["error"]["message"]
    assert refused["bytes"] is refused["kld_mean"] is refused["directory"] is None and refused["pareto"] is False
    assert result["exit_code"] == 5
    assert result["pareto"] == {"axes": ["bytes", "kld_mean"], "recipes": ["int8", "int4"]}
    assert (result["kind"], result["windows"], result["context"]) == ("language-model", 3, 32)
    assert not (folder / "refused").exists()


def test_documented_keys(whole: tuple[Path, dict[str, Any]]) -> None:
    example, written = documented("compare"), json.loads(compare_document(whole[1]).to_json())
    assert set(written) == set(example) and list(written)[:2] == ["schema", "report"]
    for row in written["rows"]:
        assert set(row) == set(example["rows"][0])
    for name in ("speed", "float", "calibration", "pareto"):
        assert set(written[name]) == set(example[name])


class Fakes:
    """Stand-ins for what takes long; they count, and make artifacts without a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **fails: Exception) -> None:
        self.fails = fails
        self.compiled: list[str] = []
        self.evaluated: list[list[str]] = []
        self.benched: list[str] = []
        monkeypatch.setattr(compiler, "compile", self.compile)
        monkeypatch.setattr(evaluation, "evaluate_each", self.evaluate_each)
        monkeypatch.setattr(benches, "bench", self.bench)
        monkeypatch.setattr("gc.collect", lambda: 0)  # nothing to collect, and a full collection takes long

    def compile(self, model: Any, *, output: Path, recipe: Any, overwrite: bool, reporter: Any, **options: Any) -> Any:
        self.compiled.append(recipe.name)
        if recipe.name in self.fails:
            raise self.fails[recipe.name]
        fake.write(output, overwrite=overwrite, recipe=recipe.name)
        totals = {"bytes": {"total": 1000 * recipe.linear.bits}, "bits_per_weight": recipe.linear.bits, "coverage": 1.0}
        return SimpleNamespace(layers={"totals": totals}, manifest=fake.manifest())

    def evaluate_each(self, targets: list[str], against: str, **options: Any) -> list[Any]:
        names = [Path(target).name for target in targets]
        self.evaluated.append(names)
        scores = {"kind": "language-model", "context": 8, "stride": 8, "windows": 2, "tokens": 14, "against_perplexity": 9.0}
        return [self.fails.get(f"evaluate_{name}") or scores | {"perplexity": 10.0, "kld_mean": 1 / len(name)} for name in names]

    def bench(self, path: Path, **options: Any) -> dict[str, Any]:
        self.benched.append(path.name)
        spread = {"median": float(len(self.benched))}
        return {"prefill_tokens_per_second": spread, "decode_tokens_per_second": spread}

    def calls(self) -> tuple[list[str], list[str], int]:
        """What was done since the last time."""
        found = self.compiled, [name for names in self.evaluated for name in names], len(self.benched)
        self.compiled, self.evaluated, self.benched = [], [], []
        return found


def test_what_is_there_is_not_done_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, out = Fakes(monkeypatch), tmp_path / "out"
    first = compare(checkpoint, ["int8", "int4"], output=out, repeats=3)
    assert fakes.calls() == (["int8", "int4"], ["int8", "int4"], 6)
    again = compare(checkpoint, ["int8", "int4"], output=out, repeats=3)
    assert fakes.calls() == ([], [], 0)
    assert [row.pop("reused") for row in again["rows"]] == [{"compile": True, "evaluation": True, "speed": True}] * 2
    assert [row.pop("reused") for row in first["rows"]] == [{"compile": False, "evaluation": False, "speed": False}] * 2
    assert again == first
    # another evaluation, another speed, one recipe more, fewer
    compare(checkpoint, ["int8", "int4"], output=out, repeats=3, max_windows=1)
    assert fakes.calls() == ([], ["int8", "int4"], 0)
    compare(checkpoint, ["int8", "int4"], output=out, repeats=2, max_windows=1)
    assert fakes.calls() == ([], [], 4)
    compare(checkpoint, ["int8", "int4", "int3"], output=out, repeats=2, max_windows=1)
    assert fakes.calls() == (["int3"], ["int3"], 6)
    compare(checkpoint, ["int3", "int4", "int8"], output=out, repeats=2, max_windows=1)
    assert fakes.calls() == ([], [], 0)
    # another calibration
    compare(checkpoint, ["int4"], output=out, repeats=2, max_windows=1, samples=7)
    assert fakes.calls() == (["int4"], ["int4"], 2)


def test_speeds_are_taken_in_turn(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch)
    result = compare(checkpoint, ["int8", "int4"], repeats=3)
    assert fakes.benched == ["int8", "int4"] * 3
    assert [row["decode_tokens_per_second"] for row in result["rows"]] == [
        {"median": 3.0, "min": 1.0, "max": 5.0, "samples": [1.0, 3.0, 5.0]},
        {"median": 4.0, "min": 2.0, "max": 6.0, "samples": [2.0, 4.0, 6.0]},
    ]


def test_a_change_in_the_artifact_or_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_decoder(tmp_path / "model"), tmp_path / "out"
    fakes = Fakes(monkeypatch)
    compare(model, ["int8", "int4"], output=out)
    fakes.calls()
    (out / "int4" / "model.onnx.data").write_bytes(b"damaged")
    compare(model, ["int8", "int4"], output=out)
    assert fakes.calls()[:2] == (["int4"], ["int4"])
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    compare(model, ["int8", "int4"], output=out)
    assert fakes.calls()[:2] == (["int8", "int4"], ["int8", "int4"])


def test_a_recipe_that_changed_under_its_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, file = Fakes(monkeypatch), tmp_path / "mine.yaml"
    for bits in (4, 3):
        file.write_text(f"name: mine\nlinear: {{bits: {bits}}}\n")
        compare(checkpoint, ["int8", file], output=tmp_path / "out")
    assert fakes.compiled == ["int8", "mine", "mine"]


def test_failures_are_rows(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = {"int3": UnsupportedError("no kernel"), "evaluate_int8": GateError("NaN"), "int2": MemoryError("3 GiB")}
    fakes = Fakes(monkeypatch, **fails)
    result = compare(checkpoint, ["int3", "int8", "int4", "int2"], output=tmp_path / "out", repeats=1)
    assert fakes.calls() == (["int3", "int8", "int4", "int2"], ["int8", "int4"], 1)
    assert [row["error"] for row in result["rows"]] == [
        {"exit_code": 4, "message": "no kernel"},
        {"exit_code": 5, "message": "NaN"},
        None,
        {"exit_code": 6, "message": "out of memory: 3 GiB"},
    ]
    assert result["exit_code"] == 6 and result["pareto"]["recipes"] == ["int4"]
    # what failed is tried again, what was done is not
    compare(checkpoint, ["int3", "int8", "int4", "int2"], output=tmp_path / "out", repeats=1)
    assert fakes.calls() == (["int3", "int2"], ["int8"], 0)


def test_all_fail(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch, int4=UnsupportedError("no kernel"))
    result = compare(checkpoint, ["int4"])
    assert result["exit_code"] == 4 and result["float"]["perplexity"] is None and result["pareto"]["recipes"] == []
    assert plain(compare_document(result)).endswith("\nfailed\nint4: no kernel\n")


def test_stopped_on_request_is_no_row(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch, int4=Stopped("resume"))
    with pytest.raises(Stopped):
        compare(checkpoint, ["int4", "int8"])


def test_an_interruption_keeps_what_was_done(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, out = Fakes(monkeypatch, int4=KeyboardInterrupt()), tmp_path / "out"  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        compare(checkpoint, ["int8", "int4"], output=out)
    # as if it had been killed when the artifact was complete and not yet recorded
    fake.write(out / "int4")
    fakes.fails.clear()
    fakes.calls()
    compare(checkpoint, ["int8", "int4"], output=out)
    assert fakes.calls()[:2] == (["int4"], ["int8", "int4"])


def test_refusals(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch)
    (tmp_path / "mine.yaml").write_text("name: int4\nlinear: {bits: 3}\n")
    (tmp_path / "bad.yaml").write_text("name: ../up\nlinear: {bits: 3}\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    fake.write(tmp_path / "taken" / "int4")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "compare.json").write_text("[]")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "compare.json").write_text('{"schema": 2, "runs": {}}')
    for recipes, options, error, message in (
        ([], {}, UsageError, "no recipe is given"),
        (["int5"], {}, UsageError, "int5"),
        (["int4", tmp_path / "mine.yaml"], {}, UsageError, r"two recipes are named 'int4' \(int4 and .*mine.yaml\)"),
        ([tmp_path / "bad.yaml"], {}, UsageError, "becomes a directory's"),
        (["int4"], {"repeats": 0}, UsageError, "repeats is 0"),
        (["int4"], {"output": checkpoint / "out"}, InputError, "inside the model"),
        (["int4"], {"output": tmp_path / "no" / "out"}, InputError, "there is no directory"),
        (["int4"], {"output": tmp_path / "file"}, InputError, "is a file"),
        (["int4"], {"output": tmp_path / "taken"}, InputError, "not from a comparison"),
        (["int4"], {"output": tmp_path / "strange"}, InputError, "cannot be read as the record of a comparison"),
        (["int4"], {"output": tmp_path / "newer"}, InputError, "schema 2, expected 1"),
    ):
        with pytest.raises(error, match=message):
            compare(checkpoint, recipes, **options)
    with pytest.raises(InputError, match="no such directory"):
        compare(tmp_path / "gone", ["int4"])
    assert fakes.calls() == ([], [], 0)


def test_keys(checkpoint: Path, tmp_path: Path) -> None:
    assert key(1, "a") == key(1, "a") != key(1, "b")
    other = tiny_decoder(tmp_path / "other")
    assert base_key(checkpoint) == base_key(other)
    (other / "tokenizer.json").write_text("{}")
    assert base_key(checkpoint) != base_key(other)


def test_infinite_measurements_are_read_back(tmp_path: Path) -> None:
    recipe = load_recipe("int4")
    store = Store(tmp_path)
    run = store.run(recipe, "k", tmp_path / "model")
    run.found = {"evaluation": {"key": "k", "result": {"perplexity": math.inf}}}
    store.save(run)
    assert Store(tmp_path)._runs == {"int4": run.found}


def test_pareto() -> None:
    assert pareto([]) == []
    assert pareto([(2, 1.0), (1, 2.0), (2, 2.0), (1, 3.0), (3, 0.5)]) == [True, True, False, False, True]
    # equal points stay together; as good on one axis and worse on the other does not
    assert pareto([(1, 1.0), (1, 1.0), (1, 2.0), (2, 1.0)]) == [True, True, False, False]
    assert pareto([(1, math.inf), (2, 1.0)]) == [True, True]


def row(name: str, size: int | None, kld: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": name, "error": None, "bytes": size, "bits_per_weight": 4.5, "perplexity": 10.25, "perplexity_se": None,
        "kld_mean": kld, "kld_mean_se": 0.001, "kld_p99": 0.5, "same_top": 0.9, "cosine": None, "sqnr_db": None,
        "decode_tokens_per_second": {"median": 1234.5}, "prefill_tokens_per_second": None, "compile_seconds": 61.0,
        "peak_rss_bytes": 2**29,
    } | changes  # fmt: skip


def result(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "target": "onnx", "text": "a text", "kind": "language-model", "context": 8, "windows": 2, "tokens": 1400,
        "speed": {"prompt_tokens": 16, "new_tokens": 4, "repeats": 2, "threads": 1, "cpu": "a processor"},
        "float": {"bytes": 2**20, "perplexity": 10.0, "perplexity_se": 0.5}, "rows": rows, "pareto": _mark(rows),
    } | changes  # fmt: skip


def test_table() -> None:
    failed = row("int2", None, None, error={"exit_code": 4, "message": "no kernel"}, bits_per_weight=None, perplexity=None,
                 kld_mean_se=None, kld_p99=None, same_top=None, decode_tokens_per_second=None, compile_seconds=None,
                 peak_rss_bytes=None)  # fmt: skip
    rows = [row("int8", 400_000, 0.001), row("worse", 400_000, 0.002), row("int4", 200_000, 0.01), failed]
    assert plain(compare_document(result(rows))) == """\
model        tiny, target onnx
text         a text
measured on  1,400 tokens in 2 windows of 8
speed        prompt of 16, 4 new tokens, median of 2 rounds; a processor, 1 threads

recipe         *            size  bits/weight  perplexity  ± se      KLD     ± se  KLD 99 %  same top  decode/s  prompt/s  compile  peak memory
float (torch)            1.0 MiB        32.00       10.00  0.50  0.00000        -         -    100.0%         -         -        -            -
int8           *       390.6 KiB         4.50       10.25     -  0.00100  0.00100    0.5000     90.0%      1234         -    1m01s    512.0 MiB
worse                  390.6 KiB         4.50       10.25     -  0.00200  0.00100    0.5000     90.0%      1234         -    1m01s    512.0 MiB
int4           *       195.3 KiB         4.50       10.25     -  0.01000  0.00100    0.5000     90.0%      1234         -    1m01s    512.0 MiB
int2           failed          -            -           -     -        -        -         -         -         -         -        -            -

* no other recipe here is both smaller and closer to the float model (mean KLD)

failed
int2: no kernel
"""  # noqa: E501


def test_table_of_outputs() -> None:
    none = {"kld_mean_se": None, "kld_p99": None, "same_top": None, "perplexity": None, "decode_tokens_per_second": None}
    rows = [
        row("exact", 300, None, cosine=1.0, **none),
        row("int8", 200, None, cosine=0.9999, sqnr_db=40.0, **none),
        row("worse", 250, None, cosine=0.999, sqnr_db=30.0, **none),
    ]
    found = result(rows, kind="outputs")
    assert found["pareto"] == {"axes": ["bytes", "sqnr_db"], "recipes": ["exact", "int8"]}
    lines = plain(compare_document(found)).split("\n\n")[1].splitlines()
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert table == [
        ["recipe", "*", "size", "bits/weight", "cosine", "SQNR dB", "compile", "peak memory"],
        ["float (torch)", "1.0 MiB", "32.00", "-", "-", "-", "-"],
        ["exact", "*", "300 B", "4.50", "1.00000", "-", "1m01s", "512.0 MiB"],
        ["int8", "*", "200 B", "4.50", "0.99990", "40.0", "1m01s", "512.0 MiB"],
        ["worse", "250 B", "4.50", "0.99900", "30.0", "1m01s", "512.0 MiB"],
    ]


@pytest.mark.slow
def test_an_encoder(tmp_path: Path) -> None:
    found = compare(tiny_encoder(tmp_path / "encoder"), ["int8"], samples=1, length=16, context=16, max_windows=2)
    (only,) = found["rows"]
    assert found["kind"] == "outputs" and found["pareto"] == {"axes": ["bytes", "sqnr_db"], "recipes": ["int8"]}
    assert only["error"] is None and only["directory"] is None and only["perplexity"] is only["decode_tokens_per_second"] is None
    assert only["cosine"] == min(o["cosine"] for o in only["outputs"].values()) > 0.99
    assert only["sqnr_db"] == min(o["sqnr_db"] for o in only["outputs"].values()) > 20
    assert found["exit_code"] == 0


def test_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fakes = Fakes(monkeypatch, int3=GateError("too few"))
    (tmp_path / "mine.yaml").write_text("name: mine\nlinear: {bits: 4}\n")
    recipes = ["--recipes", "int8,int3", str(tmp_path / "mine.yaml")]
    assert main(["compare", str(checkpoint), *recipes, "--repeats", "1", "--windows", "2", "--json"]) == 5
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert (data["schema"], data["report"], data["exit_code"]) == (1, "compare", 5)
    assert fakes.compiled == ["int8", "int3", "mine"] and "warning: int3 failed: too few" in err
    assert main(["compare", str(checkpoint), "--recipes", "int8", "--max-windows", "2", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "int8           *" in out
    assert main(["compare", str(checkpoint), "--recipes", "int8", "--text", str(tmp_path / "no.txt")]) == 3
    assert main(["compare", str(checkpoint)]) == 2


def test_highest_peak() -> None:
    """It is over the whole block, though what watches passes forgets the peak in between."""
    watch = PeakMemory()
    with HighestPeak() as outer:
        block = bytearray(2**27)
        block[::4096] = b"x" * len(block[::4096])
        watch.before(None)  # type: ignore[arg-type]
        del block
        watch.before(None)  # type: ignore[arg-type]
        after = watch.after(None)["peak_rss_bytes"]  # type: ignore[arg-type]
    if outer.bytes is None:
        pytest.skip("this system cannot forget a peak")
    assert outer.bytes - after > 2**26
