"""The little DER (X.690) this library writes and reads by hand.

- `element` writes; `Reader` reads back and accepts the one canonical length only.
- Reading never trusts a length: it stays inside its own bounds or raises `DerError`.
- `DerError` does not leave the library; the caller turns it into its own refusal.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Final

__all__ = [
    "BIT_STRING",
    "BOOLEAN_TRUE",
    "INTEGER",
    "OCTET_STRING",
    "OID",
    "SEQUENCE",
    "DerError",
    "Reader",
    "element",
    "element_head",
    "encode_integer",
    "encode_oid",
    "encode_time",
]

INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
OID: Final = 0x06
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SEQUENCE: Final = 0x30
BOOLEAN_TRUE: Final = b"\x01\x01\xff"

_SHORT: Final = tuple(bytes((length,)) for length in range(128))


class DerError(Exception):
    """Bytes that are not the DER that was expected; the text says what was."""


def element(tag: int, content: bytes) -> bytes:
    """One tag-length-value, for low tag numbers and contents below 2^32 bytes."""
    length = len(content)
    if length < 128:
        return bytes((tag, length)) + content
    return element_head(tag, length) + content


def element_head(tag: int, length: int) -> bytes:
    """Tag and length of an element whose content of `length` bytes follows."""
    if length < 128:
        return bytes((tag, length))
    if length < 256:
        return bytes((tag, 0x81, length))
    if length < 65536:
        return bytes((tag, 0x82, length >> 8, length & 0xFF))
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size, "big")


def encode_integer(value: int) -> bytes:
    """A non-negative INTEGER."""
    return element(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def encode_oid(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER from its dotted text."""
    arcs = [int(arc) for arc in dotted.split(".")]
    content = bytearray()
    for arc in (arcs[0] * 40 + arcs[1], *arcs[2:]):
        group = [arc & 0x7F]
        while arc := arc >> 7:
            group.append(0x80 | (arc & 0x7F))
        content += bytes(reversed(group))
    return element(OID, bytes(content))


@lru_cache(maxsize=256)
def encode_time(moment: datetime) -> bytes:
    """A Time of whole seconds in UTC: UTCTime until 2049, then GeneralizedTime (RFC 5280 4.1.2.5).

    `moment` must be aware, in UTC and from 1950 on; fractions of a second are dropped.
    """
    year = moment.year
    rest = (
        f"{moment.month:02d}{moment.day:02d}"
        f"{moment.hour:02d}{moment.minute:02d}{moment.second:02d}Z"
    )
    if year < 2050:
        return b"\x17\x0d" + f"{year % 100:02d}{rest}".encode("ascii")
    return b"\x18\x0f" + f"{year:04d}{rest}".encode("ascii")


class Reader:
    """A cursor over `data[position:end]`. Every method moves it forward or raises `DerError`."""

    __slots__ = ("data", "end", "position")

    def __init__(self, data: bytes, position: int = 0, end: int | None = None) -> None:
        self.data = data
        self.position = position
        self.end = len(data) if end is None else end

    def enter(self, tag: int, what: str) -> Reader:
        """A reader over the content of the next element; this one moves behind it."""
        data, start = self.data, self.position
        if start + 2 > self.end or data[start] != tag:
            raise DerError(f"{what} expected")
        length = data[start + 1]
        start += 2
        if length >= 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4 or start + size > self.end:
                raise DerError(f"the length of {what} is not DER")
            length = int.from_bytes(data[start : start + size], "big")
            if length < 0x80 or length >> (8 * (size - 1)) == 0:
                raise DerError(f"the length of {what} is not DER")
            start += size
        stop = start + length
        if stop > self.end:
            raise DerError(f"{what} is cut short")
        self.position = stop
        return Reader(data, start, stop)

    def content(self, tag: int, what: str) -> bytes:
        """The content of the next element."""
        inner = self.enter(tag, what)
        return self.data[inner.position : inner.end]

    def whole(self, tag: int, what: str) -> bytes:
        """The next element with its tag and length."""
        start = self.position
        self.enter(tag, what)
        return self.data[start : self.position]

    def next_is(self, tag: int) -> bool:
        """Whether another element follows here and has that tag."""
        return self.position < self.end and self.data[self.position] == tag

    @property
    def at_end(self) -> bool:
        """Whether everything was read."""
        return self.position == self.end

    def finish(self, what: str) -> None:
        """Raises `DerError` unless everything was read."""
        if self.position != self.end:
            raise DerError(f"something follows {what}")
