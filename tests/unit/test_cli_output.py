"""Tables, facts, times and JSON as they are printed."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

import click
import pytest

from identity_broker.cli import output
from identity_broker.cli.options import Duration
from identity_broker.cli.output import OutputFormat, Style, Text

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_off_a_terminal_is_plain_and_aligned() -> None:
    rows: list[output.Row] = [["a", Text("live", Style.GOOD)], ["longer", "x"]]
    assert output.table(["id", "state"], rows, empty="").splitlines() == [
        "ID      STATE",
        "a       live",
        "longer  x",
    ]


def test_an_empty_table_talks_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit(OutputFormat.TABLE, [], lambda: output.table(["id"], [], empty="none yet"))
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "none yet\n")


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colour(env: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert output.shows_colour(Terminal()) is coloured
    assert ("\x1b" in output.paint("x", Style.GOOD, Terminal())) is coloured


def test_marks_are_words_where_the_encoding_has_no_ticks() -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert output.mark(held=True, stream=ascii_only) == "ok"
    assert output.mark(held=False, stream=ascii_only) == "no"
    utf8 = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert output.mark(held=False, stream=utf8) == "✗"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "now"),
        (59, "in 59s"),
        (-61, "1m 1s ago"),
        (3600, "in 1h"),
        (90061, "in 1d 1h"),
        (-86400, "1d ago"),
    ],
)
def test_distance(seconds: int, text: str) -> None:
    assert output.distance(NOW + timedelta(seconds=seconds), NOW) == text


def test_documents_have_the_types_of_json() -> None:
    @dataclass
    class Thing:
        at: datetime
        ttl: timedelta | None
        names: tuple[str, ...]
        style: Style

    east = NOW.astimezone(timezone(timedelta(hours=3)))
    document = output.to_document(Thing(east, timedelta(minutes=1), ("a",), Style.GOOD))
    assert json.loads(json.dumps(document)) == {
        "at": "2030-01-01T00:00:00Z",
        "ttl_seconds": 60,
        "names": ["a"],
        "style": "32",
    }


def test_json_escapes_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit(OutputFormat.JSON, {"hint": "\x1b[2J\x9b"}, lambda: "")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x9b" not in printed


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("1h30m", 5400), ("7d", 604800), ("0s", 0)]
)
def test_durations(text: str, seconds: int) -> None:
    assert Duration().convert(text, None, None) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "5", "m", "1m1h", "-5s", "1.5h", "5 m", "9999999d", "\u0661s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a duration"):
        Duration().convert(text, None, None)
