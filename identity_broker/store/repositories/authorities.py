"""Signing authorities: certificates and key names, never keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, select, update

from identity_broker.domain.events import Topic
from identity_broker.store.mapping import authority_from_row, authority_values
from identity_broker.store.repositories.outbox import OutboxRepository
from identity_broker.store.tables import authorities, authority_sets
from identity_ca.authority import Authority, AuthorityKind


class AuthorityRepository:
    """Stores the authorities of both kinds."""

    def __init__(self, connection: Connection, outbox: OutboxRepository) -> None:
        self._connection = connection
        self._outbox = outbox

    def all(self) -> list[Authority]:
        """Every authority; those of one kind in the order they were stored in."""
        query = select(authorities).order_by(authorities.c.kind, authorities.c.position)
        return [authority_from_row(row) for row in self._connection.execute(query)]

    def replace_all(self, kind: AuthorityKind, new: Sequence[Authority]) -> None:
        """Store these as all the authorities of a kind, in this order.

        Raises:
            InvariantViolated: two are active, two are prepared, or an id stands twice.
        """
        self._connection.execute(delete(authorities).where(authorities.c.kind == kind.value))
        if new:
            self._connection.execute(
                insert(authorities),
                [authority_values(authority, place) for place, authority in enumerate(new)],
            )
        counted = self._connection.execute(
            update(authority_sets)
            .where(authority_sets.c.kind == kind.value)
            .values(version=authority_sets.c.version + 1)
        )
        if not counted.rowcount:
            self._connection.execute(insert(authority_sets).values(kind=kind.value, version=1))
        self._outbox.append(Topic.AUTHORITY, kind.value)

    def sequence(self) -> int:
        """How often authorities were replaced: grows with every change of the bundle."""
        query = select(func.coalesce(func.sum(authority_sets.c.version), 0))
        return int(self._connection.execute(query).scalar_one())
