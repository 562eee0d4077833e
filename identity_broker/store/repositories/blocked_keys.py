"""Keys that are refused for ever. Nothing unblocks one."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from identity_broker.domain.events import Topic
from identity_broker.domain.revocation import BlockedKey
from identity_broker.store.order_mapping import blocked_key_from_row, blocked_key_values
from identity_broker.store.order_tables import blocked_keys
from identity_broker.store.repositories.outbox import OutboxRepository


class BlockedKeyRepository:
    """Stores blocked keys."""

    def __init__(self, connection: Connection, outbox: OutboxRepository) -> None:
        self._connection = connection
        self._outbox = outbox

    def block(self, key: BlockedKey) -> bool:
        """Block a key; return whether it was not blocked before. The first order stays named."""
        known = select(blocked_keys.c.fingerprint).where(
            blocked_keys.c.fingerprint == key.fingerprint
        )
        if self._connection.execute(known).one_or_none() is not None:
            return False
        self._connection.execute(insert(blocked_keys).values(blocked_key_values(key)))
        self._outbox.append(Topic.KEY, key.fingerprint)
        return True

    def all(self) -> list[BlockedKey]:
        """Every blocked key, in the order of fingerprints."""
        query = select(blocked_keys).order_by(blocked_keys.c.fingerprint)
        return [blocked_key_from_row(row) for row in self._connection.execute(query)]
