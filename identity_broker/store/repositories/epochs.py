"""Epochs: until when the JWT-SVIDs of an identity are refused. They only rise."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from identity_broker.domain.events import Topic
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.store.mapping import to_micros
from identity_broker.store.order_mapping import epoch_from_row, epoch_values
from identity_broker.store.order_tables import identity_epochs
from identity_broker.store.repositories.outbox import OutboxRepository
from identity_ca.spiffe_id import SpiffeId

_CHUNK = 500


class EpochRepository:
    """Stores epochs."""

    def __init__(self, connection: Connection, outbox: OutboxRepository) -> None:
        self._connection = connection
        self._outbox = outbox

    def raise_to(self, epoch: IdentityEpoch) -> bool:
        """Raise the identity's epoch and its expiry as far as given; return whether either rose."""
        values = epoch_values(epoch)
        row = self._connection.execute(
            select(identity_epochs).where(identity_epochs.c.spiffe_id == values["spiffe_id"])
        ).one_or_none()
        if row is None:
            self._connection.execute(insert(identity_epochs).values(values))
        else:
            raised = {
                name: max(getattr(row, name), values[name]) for name in ("not_before", "expires_at")
            }
            if raised == {name: getattr(row, name) for name in raised}:
                return False
            self._connection.execute(
                update(identity_epochs)
                .where(identity_epochs.c.spiffe_id == values["spiffe_id"])
                .values(raised)
            )
        self._outbox.append(Topic.EPOCH, values["spiffe_id"])
        return True

    def live(self, now: datetime) -> list[IdentityEpoch]:
        """Those that may still end a token at `now`, in the order of SPIFFE IDs."""
        query = (
            select(identity_epochs)
            .where(identity_epochs.c.expires_at > to_micros(now))
            .order_by(identity_epochs.c.spiffe_id)
        )
        return [epoch_from_row(row) for row in self._connection.execute(query)]

    def get_many(self, ids: Collection[SpiffeId]) -> list[IdentityEpoch]:
        """The epochs of those of these identities that have one, expired or not."""
        wanted = sorted({str(spiffe_id) for spiffe_id in ids})
        return [
            epoch_from_row(row)
            for start in range(0, len(wanted), _CHUNK)
            for row in self._connection.execute(
                select(identity_epochs).where(
                    identity_epochs.c.spiffe_id.in_(wanted[start : start + _CHUNK])
                )
            )
        ]
