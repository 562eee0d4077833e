"""Join tokens: hashes only, used once.

- Using a token is one UPDATE with its conditions in it: of any number of users one wins.
- The caller is told one sentence whatever was wrong; the log is told which.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from identity_broker.domain.node import JoinToken
from identity_broker.errors import JoinTokenRejected
from identity_broker.store.mapping import join_token_from_row, join_token_values, to_micros
from identity_broker.store.steps import STEP
from identity_broker.store.tables import join_tokens


class JoinTokenRepository:
    """Stores join tokens."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, token: JoinToken) -> None:
        """Store a new token.

        Raises:
            InvariantViolated: its hash is stored already, or it expires before it is made.
        """
        self._connection.execute(insert(join_tokens).values(join_token_values(token)))

    def consume(self, token_hash: str, now: datetime) -> JoinToken:
        """Use the token up; return it.

        Raises:
            JoinTokenRejected: unknown, used or expired.
        """
        moment = to_micros(now)
        used = self._connection.execute(
            update(join_tokens)
            .where(
                join_tokens.c.token_hash == token_hash,
                join_tokens.c.used_at.is_(None),
                join_tokens.c.expires_at > moment,
            )
            .values(used_at=moment)
        )
        row = self._connection.execute(
            select(join_tokens).where(join_tokens.c.token_hash == token_hash)
        ).one_or_none()
        if used.rowcount == 1 and row is not None:
            return join_token_from_row(row)
        if row is None:
            raise JoinTokenRejected(detail="unknown join token")
        token = join_token_from_row(row)
        state = (
            f"expired at {token.expires_at.isoformat()}"
            if token.used_at is None
            else f"already used at {token.used_at.isoformat()}"
        )
        raise JoinTokenRejected(detail=f"the join token of {token.node_id} was {state}")

    def release(self, token_hash: str) -> None:
        """Make a used token usable again: no node came of it. An unknown one is let be."""
        self._connection.execute(
            update(join_tokens).where(join_tokens.c.token_hash == token_hash).values(used_at=None)
        )

    def purge(self, now: datetime, limit: int = STEP) -> int:
        """Remove tokens that have expired, used or not.

        Returns:
            How many; call again while it is `limit`.
        """
        due = (
            select(join_tokens.c.token_hash)
            .where(join_tokens.c.expires_at <= to_micros(now))
            .order_by(join_tokens.c.expires_at)
            .limit(limit)
        )
        hashes = self._connection.execute(due).scalars().all()
        self._connection.execute(delete(join_tokens).where(join_tokens.c.token_hash.in_(hashes)))
        return len(hashes)
