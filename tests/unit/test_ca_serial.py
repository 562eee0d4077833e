"""Serial numbers and token ids."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from identity_ca.serial import SERIAL_OCTETS, new_jti, new_serial, serial_hex
from support.ca_material import NOW


@pytest.mark.parametrize("year", [1999, 2000, 2026, 2038, 2067, 2100, 9999])
def test_always_twenty_octets_and_positive(year: int) -> None:
    serial = new_serial(datetime(year, 1, 1, tzinfo=UTC))
    octets = serial.to_bytes(SERIAL_OCTETS, "big")
    assert 0 < octets[0] < 0x80
    assert len(serial_hex(serial)) == 40


def test_at_least_120_random_bits() -> None:
    drawn = [new_serial(NOW) for _ in range(256)]
    changing = 0
    for serial in drawn:
        changing |= serial ^ drawn[0]
    # Each bit stays the same in 256 draws with a chance of 2^-255.
    assert changing.bit_count() == 128
    assert len(set(drawn)) == 256


def test_later_serials_are_larger() -> None:
    early, late = new_serial(NOW), new_serial(NOW + timedelta(seconds=1))
    assert early < late
    assert new_jti(NOW) < new_jti(NOW + timedelta(seconds=1))


def test_hex_is_even_padded_and_lower_case() -> None:
    assert serial_hex(0xAB) == "ab".zfill(40)
    assert serial_hex(0xA << 160) == f"0{0xA << 160:x}"
    assert len(new_jti(NOW)) == 40
    with pytest.raises(ValueError, match="negative"):
        serial_hex(-1)
