"""Small repositories over one transaction: domain values in, domain values out.

- A `Repositories` lives as long as its transaction and is used by one thread.
- Changes that others must learn of append their own outbox rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError

from identity_broker.store.errors import translate
from identity_broker.store.repositories.audit import AuditRepository
from identity_broker.store.repositories.authorities import AuthorityRepository
from identity_broker.store.repositories.blocked_keys import BlockedKeyRepository
from identity_broker.store.repositories.credentials import CredentialRepository
from identity_broker.store.repositories.crl_numbers import CrlNumberRepository
from identity_broker.store.repositories.entries import EntryRepository
from identity_broker.store.repositories.epochs import EpochRepository
from identity_broker.store.repositories.holds import HoldRepository
from identity_broker.store.repositories.join_tokens import JoinTokenRepository
from identity_broker.store.repositories.lasting_holds import LastingHolds
from identity_broker.store.repositories.nodes import NodeRepository
from identity_broker.store.repositories.orders import OrderRepository
from identity_broker.store.repositories.outbox import OutboxRepository
from identity_broker.store.repositories.retention import RetentionRepository


class Repositories:
    """Everything one transaction can do."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self.outbox = OutboxRepository(connection)
        lasting = LastingHolds(connection, now)
        self.entries = EntryRepository(connection, self.outbox, lasting, now)
        self.nodes = NodeRepository(connection, self.outbox, lasting)
        self.holds = HoldRepository(connection, self.outbox, self.entries, self.nodes, lasting)
        self.orders = OrderRepository(connection)
        self.blocked_keys = BlockedKeyRepository(connection, self.outbox)
        self.epochs = EpochRepository(connection, self.outbox)
        self.crl_numbers = CrlNumberRepository(connection)
        self.join_tokens = JoinTokenRepository(connection)
        self.authorities = AuthorityRepository(connection, self.outbox)
        self.audit = AuditRepository(connection)
        self.credentials = CredentialRepository(connection, self.outbox, self.audit, now)
        self.retention = RetentionRepository(connection)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what the block did, and that alone, when it raises: one item of a batch.

        Raises:
            MalformedRequest: the block's values cannot be stored.
            InvariantViolated: a constraint refused them.
        """
        try:
            with self._connection.begin_nested():
                yield
        except (DataError, IntegrityError) as error:
            # The item's own fault. Anything else is the transaction's, and goes on up to it.
            raise translate(error) from error


__all__ = [
    "AuditRepository",
    "AuthorityRepository",
    "BlockedKeyRepository",
    "CredentialRepository",
    "CrlNumberRepository",
    "EntryRepository",
    "EpochRepository",
    "HoldRepository",
    "JoinTokenRepository",
    "NodeRepository",
    "OrderRepository",
    "OutboxRepository",
    "Repositories",
    "RetentionRepository",
]
