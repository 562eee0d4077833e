"""CRL numbers: how high each authority has counted. They only rise."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from identity_broker.store.order_tables import crl_numbers


class CrlNumberRepository:
    """Stores the highest number reserved."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def all(self) -> dict[str, int]:
        """Authority id → the highest number that a list of it may have."""
        rows = self._connection.execute(select(crl_numbers))
        return {row.authority_id: int(row.number) for row in rows}

    def reserve(self, authority_id: str, number: int) -> None:
        """Note that lists up to that number may be out; less than is stored changes nothing."""
        known = self._connection.execute(
            select(crl_numbers.c.number).where(crl_numbers.c.authority_id == authority_id)
        ).scalar_one_or_none()
        if known is None:
            self._connection.execute(
                insert(crl_numbers).values(authority_id=authority_id, number=number)
            )
        elif number > known:
            self._connection.execute(
                update(crl_numbers)
                .where(crl_numbers.c.authority_id == authority_id)
                .values(number=number)
            )
