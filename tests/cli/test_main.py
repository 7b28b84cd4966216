"""What every command shares: exit codes, signals, pipes, crash records, help."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcompiler import errors
from qcompiler.cli import main
from qcompiler.cli.main import EXIT_CODES, build_parser
from tests.cli.process import ROOT, environment, qcompiler
from tests.report import fake

COMMANDS = (
    "compile", "run", "eval", "compare", "sensitivity", "inspect", "diff", "verify", "bench", "doctor", "library", "repack",
)  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `qcompiler doctor` raise."""

    def diagnose() -> None:
        raise error.with_traceback(None)

    monkeypatch.setattr("qcompiler.report.doctor.diagnose", diagnose)


@pytest.mark.parametrize(
    ("error", "message"),
    [(KeyboardInterrupt(), "interrupted: no artifact was written"), (RuntimeError(), "internal error: RuntimeError")],
)
def test_what_is_kept_is_named_however_a_command_ends(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Not only by errors of ours: a hidden folder that is left behind is always said."""
    monkeypatch.chdir(tmp_path)  # the crash record goes here
    error.add_note("solved layers are kept in .out.work; --resume goes on from them")
    failing(monkeypatch, error)
    main(["doctor"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith(f"qcompiler: {message}")
    assert lines[-1] == "qcompiler: note: solved layers are kept in .out.work; --resume goes on from them"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.UsageError("u"), 2, "error: u"),
        (errors.InputError("i"), 3, "error: i"),
        (errors.UnsupportedError("s"), 4, "error: s"),
        (errors.GateError("g"), 5, "error: g"),
        (errors.CapacityError("c"), 6, "error: c"),
        (errors.Stopped("resume with …"), 75, "error: resume with …"),
        (MemoryError("Unable to allocate 3 GiB"), 6, "out of memory: Unable to allocate 3 GiB"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 6, "no space left while writing /x"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was saved"),
        (SystemExit(7), 7, ""),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert str(code) in EXIT_CODES or isinstance(error, SystemExit)


def test_notes_of_an_error_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.InputError("i")
    error.add_note("remove it by hand")
    failing(monkeypatch, error)
    assert main(["doctor"]) == 3
    assert capsys.readouterr().err == "qcompiler: error: i\nqcompiler: note: remove it by hand\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, errors.InputError("i"))
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        assert main(arguments) == 3
        assert "Traceback" in capsys.readouterr().err


def test_a_bug_leaves_a_crash_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    failing(monkeypatch, ZeroDivisionError("oops"))
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    (folder,) = tmp_path.glob("crash-*")
    assert out == "" and err.count("\n") == 1 and str(folder) in err and "ZeroDivisionError" in err
    record = json.loads((folder / "crash.json").read_text())
    assert record["schema"] == 1 and record["argv"] == ["doctor", "--json"] and record["error"] == "ZeroDivisionError"
    assert record["packages"]["numpy"] and "builtins.ZeroDivisionError: oops" in record["traceback"]
    assert main(["doctor"]) == 1
    assert len(list(tmp_path.glob("crash-*"))) == 1, "the same bug has the same name"


def test_a_crash_record_holds_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "".join(("my ", "sec", "ret"))  # nowhere whole in this source, whose lines are in the traceback

    def broken(path: Path) -> None:
        try:
            raise ValueError(f"cannot tokenize {secret!r}")
        except ValueError as error:
            raise RuntimeError(f"{secret} again") from error

    monkeypatch.setattr("qcompiler.runtime.artifact.open_artifact", broken)
    assert main(["run", "somewhere", secret, "--stop", f"no {secret}", "--seed", "3"]) == 1
    (folder,) = tmp_path.glob("crash-*")
    text = "".join(path.read_text() for path in folder.iterdir()) + capsys.readouterr().err
    assert secret not in text
    argv = json.loads((folder / "crash.json").read_text())["argv"]
    assert argv == ["run", "somewhere", "<text>", "--stop", "<text>", "--seed", "3"]
    assert "builtins.ValueError" in text and "builtins.RuntimeError" in text


def test_a_crash_record_goes_elsewhere_where_the_directory_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(place))
    monkeypatch.setattr(Path, "cwd", lambda: Path("/proc"))
    failing(monkeypatch, ZeroDivisionError())
    assert main(["doctor"]) == 1
    (folder,) = place.glob("crash-*")
    assert str(folder) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["verify"], "required: DIR"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
        (["run", "d", "p", "--max-tokens", "0"], "expected at least 1, found 0"),
        (["run", "d", "p", "--max-tokens", "x"], "invalid whole number value: 'x'"),
        (["run", "d", "p", "--temperature", "nan"], "expected a number, 0 or more, found nan"),
        (["run", "d", "p", "--max", "3"], "unrecognized arguments: --max"),
        (["compile", "m"], "-o DIR is needed"),
        (["compile", "m", "-o", "x", "--target", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["diff", "a"], "either a second artifact or --passes"),
        (["diff", "a", "b", "--passes", "1..2"], "either a second artifact or --passes"),
        (["inspect", "a", "--pass", "x", "--layer", "y"], "give it without --layer"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_options_may_stand_anywhere() -> None:
    parse = build_parser().parse_args
    for arguments in (["d", "p", "--seed", "1"], ["d", "--seed", "1", "p"], ["--seed", "1", "d", "p"]):
        options = parse(["run", *arguments])
        assert (options.directory, options.prompt, options.seed) == (Path("d"), "p", 1)
    assert parse(["run", "d", "--", "-p"]).prompt == "-p"
    assert parse(["diff", "a", "--json", "b"]).second == Path("b")


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^    {command}( |$)", text, re.M)
        assert main([command, "--help"]) == 0
    for code in ("0", "1", "2", "3", "4", "5", "6", "75", "130"):
        assert re.search(rf"^  {code} +\w", text, re.M)


def test_help_is_in_the_documentation() -> None:
    documentation = (ROOT / "docs" / "cli.md").read_text()
    for command in COMMANDS:
        assert f"qcompiler {command}" in documentation
        parser = next(a for a in build_parser()._actions if a.dest == "command").choices[command]
        for action in parser._actions:
            if action.option_strings and action.dest not in ("help", "debug", "quiet"):
                assert action.option_strings[-1] in documentation, (command, action.option_strings)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qcompiler ")


def test_python_m() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qcompiler", "--version"], capture_output=True, text=True, env=environment()
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_leaves_early(tmp_path: Path) -> None:
    """`qcompiler inspect … | head`: no traceback, no complaint."""
    files = fake.records()
    files["layers.json"]["layers"] = [fake.layer(f"layer.{i}") for i in range(5000)]
    target = fake.write(tmp_path / "out", files)
    process = subprocess.Popen(
        [sys.executable, "-m", "qcompiler", "inspect", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "qcompiler", "doctor"], stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert result.returncode == 6 and b"no space left" in result.stderr


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signals(tmp_path: Path, number: signal.Signals, word: str) -> None:
    """A compile stopped half-way: exit 130, one line, nothing left."""
    code = f"""
import sys, time, types
from qcompiler.artifact import ArtifactWriter
compiler = types.ModuleType("qcompiler.compiler")
def compile(model, *, output, **options):
    with ArtifactWriter(output) as writer:
        writer.write_text("a", "x")
        print("writing", flush=True)
        time.sleep(60)
compiler.compile = compile
sys.modules["qcompiler.compiler"] = compiler
from qcompiler.cli import main
sys.exit(main(["compile", "model", "-o", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, f"qcompiler: {word}: nothing was saved\n")
    assert os.listdir(tmp_path) == []


def test_messages_go_to_stderr_and_data_to_stdout(tmp_path: Path) -> None:
    result = qcompiler("verify", tmp_path / "no")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("qcompiler: error: ") and result.stderr.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    result = qcompiler(
        "--help",
        before="""
            import sys
            class Guard:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxruntime", "rich", "pydantic"):
                        raise AssertionError(f"--help imports {name}")
            sys.meta_path.insert(0, Guard())
        """,
    )
    assert result.returncode == 0, result.stderr
