"""IDs, texts, times, durations, batches and pages."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import Message

from identity_broker.domain.paging import (
    DEFAULT_PAGE_SIZE,
    MAX_PAGE_SIZE,
)
from identity_broker.errors import (
    InvalidSpiffeId,
    MalformedRequest,
    PageTokenInvalid,
)
from identity_ca.errors import SpiffeIdError
from identity_ca.spiffe_id import SpiffeId

_EPOCH = datetime.fromtimestamp(0, UTC)
_MAX_EPOCH = 253402300799  # 9999-12-31T23:59:59Z: the last time X.509 can write
MAX_BATCH = 500
MAX_TEXT_BYTES = 512
MAX_ID_BYTES = 256
MAX_PAGE_TOKEN = 4096
_PAGING = frozenset({"page_token", "page_size"})


def from_spiffe_id(text: str, field: str) -> SpiffeId:
    """Parse a required SPIFFE ID.

    Raises:
        MalformedRequest: it is missing.
        InvalidSpiffeId: it is not one.
    """
    if not text:
        raise MalformedRequest(f"{field} is required")
    try:
        return SpiffeId.parse(text)
    except SpiffeIdError as error:
        raise InvalidSpiffeId(f"{field}: {error.message}", hint=error.hint) from error


def from_optional_spiffe_id(text: str, field: str) -> SpiffeId | None:
    """Parse an optional SPIFFE ID.

    Raises:
        InvalidSpiffeId: it is not one.
    """
    return from_spiffe_id(text, field) if text else None


def from_text(text: str, field: str, most: int = MAX_TEXT_BYTES) -> str:
    """Check free text.

    Raises:
        MalformedRequest: too long or unprintable.
    """
    if len(text.encode()) > most or (text and not text.isprintable()):
        raise MalformedRequest(f"{field} is printable text of at most {most} bytes")
    return text


def from_id(text: str, field: str) -> str:
    """Check a required name of a stored object.

    Raises:
        MalformedRequest: it is missing, too long or unprintable.
    """
    if not text:
        raise MalformedRequest(f"{field} is required")
    return from_text(text, field, MAX_ID_BYTES)


def from_seconds(seconds: int, field: str) -> timedelta | None:
    """Parse a duration; 0 is None.

    Raises:
        MalformedRequest: negative.
    """
    if seconds < 0:
        raise MalformedRequest(f"{field} must not be negative")
    return timedelta(seconds=seconds) if seconds else None


def from_epoch(seconds: int, field: str) -> datetime | None:
    """Parse a time; 0 is None.

    Raises:
        MalformedRequest: outside the years 1970 to 9999.
    """
    if not 0 <= seconds <= _MAX_EPOCH:
        raise MalformedRequest(f"{field} is outside the years 1970 to 9999")
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def to_epoch(at: datetime | None) -> int:
    """Seconds since the epoch; None is 0."""
    return int(at.timestamp()) if at else 0


def to_epoch_ms(at: datetime | None) -> int:
    """Milliseconds since the epoch; None is 0."""
    return (at - _EPOCH) // timedelta(milliseconds=1) if at else 0


def from_batch(items: Sequence[object], field: str) -> None:
    """Check the size of a batch.

    Raises:
        MalformedRequest: empty or too large.
    """
    if not 1 <= len(items) <= MAX_BATCH:
        raise MalformedRequest(f"{field} must hold 1 to {MAX_BATCH} items")


def from_page_size(size: int) -> int:
    """Return the page size to use.

    Raises:
        MalformedRequest: negative or too large.
    """
    if not 0 <= size <= MAX_PAGE_SIZE:
        raise MalformedRequest(f"page_size must be between 1 and {MAX_PAGE_SIZE}")
    return size or DEFAULT_PAGE_SIZE


def page_scope(method: str, request: Message) -> str:
    """What a page token is good for: this method, with the same filter.

    Equal for equal requests, whatever broker computes it and in whatever order a filter lists.
    """
    digest = hashlib.sha256(method.encode())
    for field, value in request.ListFields():
        if field.name not in _PAGING:
            values: Iterable[Any] = value if field.is_repeated else (value,)
            digest.update(repr((field.number, sorted(map(_octets, values)))).encode())
    return digest.hexdigest()[:16]


def _octets(value: Any) -> bytes:
    if isinstance(value, Message):
        return value.SerializeToString(deterministic=True)
    return str(value).encode()


def to_page_token(key: str, scope: str) -> str:
    """Wrap a keyset position so that nobody builds on its form."""
    return base64.urlsafe_b64encode(f"2:{scope}:{key}".encode()).decode() if key else ""


def from_page_token(token: str, scope: str) -> str:
    """Unwrap a keyset position.

    Raises:
        PageTokenInvalid: not one of ours, or another method's or filter's.
    """
    if not token:
        return ""
    if len(token) > MAX_PAGE_TOKEN:
        raise PageTokenInvalid
    try:
        raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        text = raw.decode()
    except (ValueError, binascii.Error) as error:
        raise PageTokenInvalid from error
    prefix = f"2:{scope}:"
    key = text.removeprefix(prefix)
    if not text.startswith(prefix) or not key or not key.isprintable():
        raise PageTokenInvalid
    return key
