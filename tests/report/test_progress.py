"""Progress: plain lines where nobody watches, bars where somebody does."""

from __future__ import annotations

import io

from qcompiler.report.progress import Bars, Pace, Plain, Silent, duration, make_reporter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_few_and_tell_the_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    reporter = Plain(stream, clock)
    reporter.stage("solve")
    for i in range(1, 101):
        reporter.layer(i, 100, f"layer.{i}")
        clock.now += 0.5
        reporter.layer(i, 100, f"layer.{i}", "21.4 dB")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "solve"
    assert 20 <= len(lines) <= 27, "one in two seconds"
    assert lines[2] == "solve                4/100  layer.4  21.4 dB  48s left"
    assert lines[-1] == "solve              100/100  layer.100  21.4 dB"


def test_plain_slow_layers_give_a_line_each() -> None:
    clock, stream = Clock(), io.StringIO()
    reporter = Plain(stream, clock)
    reporter.stage("solve")
    for i in range(1, 4):
        clock.now += 90
        reporter.layer(i, 3, f"layer.{i}", "done")
    assert stream.getvalue().splitlines()[1:] == [
        "solve              1/3  layer.1  done  3m00s left",
        "solve              2/3  layer.2  done  1m30s left",
        "solve              3/3  layer.3  done",
    ]


def test_notes_and_warnings() -> None:
    stream = io.StringIO()
    with Plain(stream) as reporter:
        reporter.note("short text")
        reporter.warning("[bold]not markup[/]")
    assert stream.getvalue() == "note: short text\nwarning: [bold]not markup[/]\n"


def test_the_reporter_fits_the_stream() -> None:
    assert isinstance(make_reporter(quiet=True, stream=Terminal()), Silent)
    assert isinstance(make_reporter(stream=io.StringIO()), Plain)
    assert isinstance(make_reporter(stream=Terminal()), Bars)


def test_bars() -> None:
    stream = Terminal()
    with Bars(stream) as reporter:
        reporter.layer(1, 2, "early", "without a stage")
        reporter.stage("solve")
        reporter.layer(1, 2, "model.layers.0")
        reporter.warning("[red]careful[/]")
        reporter.layer(2, 2, "model.layers.0", "21 dB")
    text = stream.getvalue()
    assert "solve" in text and "[red]careful[/]" in text and "\x1b[?25h" in text, "the cursor comes back"


def test_pace_ignores_what_was_there_at_the_start() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.restart(done=10)
    clock.now = 5.0
    assert pace.left(10, 20) is None
    assert pace.left(15, 20) == 5.0


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 45, 59.6, 200, 7500)] == ["0s", "45s", "1m00s", "3m20s", "2h05m"]
