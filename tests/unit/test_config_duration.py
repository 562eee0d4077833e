from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.config import duration
from identity_broker.domain.duration import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("15m", 900),
        ("1h30m", 5400),
        ("7d", 604800),
        ("500ms", 0.5),
        ("1d1ms", 86400.001),
    ],
)
def test_reads_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "m",
        "1 hour",
        "30m1h",
        "1h1h",
        "-5s",
        "1.5h",
        "5S",
        " 5s",
        "5s ",
        "\u0665s",
        "9999999999s",
    ],
)
def test_refuses_anything_else_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration such as") as refused:
        parse_duration(text)
    assert len(text.strip()) < 2 or f'"{text}"' not in str(refused.value)


@given(st.integers(min_value=0, max_value=10**12))
def test_what_is_written_is_read_back(milliseconds: int) -> None:
    value = timedelta(milliseconds=milliseconds)
    assert parse_duration(format_duration(value)) == value


@given(st.text(max_size=12))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        value = parse_duration(text)
    except ValueError:
        return
    assert value >= timedelta(0)


def test_bounds_are_readable_in_words() -> None:
    assert str(duration._Bounds("1s", "24h")) == "between 1s and 1d"
