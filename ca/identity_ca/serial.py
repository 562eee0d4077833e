"""Serial numbers and token ids: 20 octets, time first, then 128 bits nobody can guess.

- 4 octets of seconds since 2000-01-01 keep inserts into the ledger's index in order; their top
  bit is clear, so the DER INTEGER is positive and 20 octets long (RFC 5280 section 4.1.2.2).
- 16 octets from the operating system: more than the 64 bits the CA/Browser Forum asks for and
  the 120 this product promises. Two never meet, so no counter and no lock.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Final

__all__ = ["SERIAL_OCTETS", "new_jti", "new_serial", "serial_hex"]

SERIAL_OCTETS: Final = 20
_EPOCH: Final = int(datetime(2000, 1, 1, tzinfo=UTC).timestamp())


def _octets(now: datetime) -> bytes:
    seconds = (int(now.timestamp()) - _EPOCH) & 0x7FFFFFFF
    if seconds < 0x01000000:
        # A clock outside July 2000 … 2068: 20 octets all the same, only not in order.
        seconds |= 0x01000000
    return seconds.to_bytes(4, "big") + os.urandom(16)


def new_serial(now: datetime) -> int:
    """A fresh X.509 serial number, positive and of 20 octets."""
    return int.from_bytes(_octets(now), "big")


def new_jti(now: datetime) -> str:
    """A fresh JWT id of the same layout: 40 lower-case hex digits."""
    return _octets(now).hex()


def serial_hex(serial: int) -> str:
    """A serial number as lower-case hex of even length, at least 40 digits.

    Raises:
        ValueError: the number is negative.
    """
    if serial < 0:
        raise ValueError("a serial number is not negative")
    digits = f"{serial:040x}"
    return digits if len(digits) % 2 == 0 else f"0{digits}"
