"""The ledger, read and revoked. Its rows are made by `store.ledger`.

- Every transition names the states it may start from in its WHERE clause, so of two that race one
  wins and the ledger says which: what is revoked stays revoked.
- Whether a credential may be valid is for its validity to say, not for the state expired: a clock
  that ran ahead expires what is valid again when the clock is put right.
- Revoking is set-based: one statement a step, however many credentials are meant. Where no index
  knows them, what is live is looked through: three partial indexes hold that.
- What was revoked for certificateHold may be released by its order, or revoked for another reason.
- Nothing is ever removed here; `retention` does that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    case,
    func,
    or_,
    select,
    text,
    union_all,
    update,
)

from identity_broker.domain.credential import (
    Credential,
    CredentialState,
    Revocation,
    RevocationReason,
)
from identity_broker.domain.events import AuditKind, Topic
from identity_broker.domain.paging import CredentialFilter, Page
from identity_broker.domain.revocation import LedgerCount
from identity_broker.domain.selection import Selection
from identity_broker.errors import CredentialNotFound, InvariantViolated
from identity_broker.store.mapping import (
    REVOCATION_COLUMNS,
    credential_from_row,
    revocation_from_row,
    spiffe_id_from,
    to_micros,
)
from identity_broker.store.repositories import ledger_count, page_keys, selected
from identity_broker.store.repositories.audit import AuditRepository
from identity_broker.store.repositories.outbox import OutboxRepository
from identity_broker.store.steps import STEP
from identity_broker.store.tables import (
    DEAD,
    EXPIRABLE,
    ORDERED,
    UNANSWERED,
    UNREVOKED,
    credentials,
)
from identity_ca.spiffe_id import SpiffeId

_CHUNK = 500


class CredentialRepository:
    """Reads, revokes and ages the ledger."""

    def __init__(
        self,
        connection: Connection,
        outbox: OutboxRepository,
        audit: AuditRepository,
        now: datetime,
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._audit = audit
        self._now = now

    def find(self, credential_id: str) -> Credential | None:
        """The credential with that serial or jti, if the ledger has it."""
        query = select(credentials).where(credentials.c.id == credential_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else credential_from_row(row)

    def find_many(self, ids: Collection[str]) -> list[Credential]:
        """Those of the serials and jtis that the ledger has."""
        return [
            credential_from_row(row)
            for named in _singles(ids)
            for row in self._connection.execute(select(credentials).where(named))
        ]

    def get(self, credential_id: str) -> Credential:
        """The credential with that serial or jti.

        Raises:
            CredentialNotFound: the ledger has none.
        """
        found = self.find(credential_id)
        if found is None:
            raise CredentialNotFound(f'the ledger has no credential "{credential_id[:64]}"')
        return found

    def page(self, wanted: CredentialFilter, before: str, size: int) -> Page[Credential]:
        """A page, newest first, beginning behind the key `before` (empty: at the newest).

        Raises:
            PageTokenInvalid: `before` is not a key of a page.
        """
        query = select(credentials).order_by(credentials.c.seq.desc()).limit(size + 1)
        if before:
            query = query.where(credentials.c.seq < page_keys.row_number(before))
        if wanted.spiffe_id is not None:
            query = query.where(credentials.c.spiffe_id == str(wanted.spiffe_id))
        if wanted.node_id is not None:
            query = query.where(credentials.c.node_id == str(wanted.node_id))
        if wanted.entry_id:
            query = query.where(credentials.c.entry_id == wanted.entry_id)
        if wanted.states:
            query = query.where(credentials.c.state.in_([s.value for s in wanted.states]))
        if wanted.kind is not None:
            query = query.where(credentials.c.kind == wanted.kind.value)
        if wanted.order_id:
            query = query.where(text(ORDERED), credentials.c.order_id == wanted.order_id)
        rows = list(self._connection.execute(query))
        items = [credential_from_row(row) for row in rows[:size]]
        return Page(items, str(rows[size - 1].seq) if len(rows) > size else "")

    def revoke(
        self,
        selection: Selection,
        *,
        order_id: str,
        reason: RevocationReason,
        comment: str,
        now: datetime,
        limit: int | None = None,
    ) -> tuple[Revocation, ...]:
        """Revoke what may still be valid of a selection; may be repeated.

        What is on certificateHold is revoked for good, if that is what `reason` is; it is revoked
        since it was put on hold (X.509, section 8.5.2.2).

        Args:
            order_id: by which order.
            reason: RFC 5280, section 5.3.1.
            comment: the operator's words.
            now: the time of revocation; what is past its validity by then is passed over.
            limit: of one step; it was the last when it revoked fewer. None for all in one.

        Returns:
            What was revoked by it, not what was revoked before: `count` tells that.
        """
        if not order_id:
            raise InvariantViolated(detail="a credential is revoked by an order")
        moment = to_micros(now)
        parts = selected.revocable(selection, self._connection.dialect, moment, reason)
        values = {
            "state": CredentialState.REVOKED.value,
            "revoked_at": func.coalesce(credentials.c.revoked_at, moment),
            "reason": int(reason),
            "comment": comment,
            "order_id": order_id,
            **({"singled_out": True} if selection.singles_out else {}),
        }
        allowed = or_(text(UNREVOKED), selected.on_hold(reason))
        revoked: list[Revocation] = []
        for due in self._steps(parts, order_id, limit):
            left = None if limit is None else limit - len(revoked)
            rows = self._connection.execute(
                update(credentials)
                .where(credentials.c.seq.in_(due.limit(left)), allowed)
                .values(values)
                .returning(*REVOCATION_COLUMNS)
            )
            revoked.extend(revocation_from_row(row) for row in rows)
            if len(revoked) == limit:
                break
        self._outbox.append_all(Topic.REVOCATION, [revocation.id for revocation in revoked])
        return tuple(revoked)

    def _steps(
        self, parts: list[list[selected.Condition]], order_id: str, limit: int | None
    ) -> Iterator[Select[Any]]:
        """Where to look for what is due, one place after the other, the newest first.

        Where an index is walked, a step goes on below what its order has revoked, or it would pass
        over all of that again. Not there alone: what was recorded meanwhile stands above, and
        where another transaction was slower to commit even in between.
        """
        c = credentials.c
        if len(parts) > 1:
            found = union_all(*(select(c.seq).where(*part) for part in parts)).subquery()
            yield select(found.c.seq)
            return
        due = select(c.seq).where(*parts[0]).order_by(c.seq.desc()).correlate(None)
        if limit is not None:
            own = select(func.min(c.seq)).where(text(ORDERED), c.order_id == order_id)
            lowest = self._connection.execute(own).scalar()
            if lowest is not None:
                yield due.where(c.seq < lowest)
        yield due

    def release(self, order_id: str, now: datetime, limit: int = STEP) -> list[str]:
        """Make valid again what that order revoked for certificateHold and has not expired.

        Returns:
            Serials and jtis; call again while there are `limit`.
        """
        c = credentials.c
        held: list[Any] = [
            text(ORDERED),
            c.order_id == order_id,
            c.state == CredentialState.REVOKED.value,
            c.reason == int(RevocationReason.CERTIFICATE_HOLD),
        ]
        due = select(c.seq).where(*held, c.not_after > to_micros(now)).order_by(c.seq).limit(limit)
        rows = self._connection.execute(
            update(credentials)
            .where(c.seq.in_(due), *held)
            .values(
                # As `ledger_statements` has it: it is issued once its digest is known.
                state=case(
                    (c.digest == "", CredentialState.UNCONFIRMED.value),
                    else_=CredentialState.ISSUED.value,
                ),
                revoked_at=None,
                reason=None,
                comment="",
                singled_out=False,
                order_id="",
            )
            .returning(c.id)
        )
        released = sorted(rows.scalars())
        self._outbox.append_all(Topic.REVOCATION, released)
        return released

    def nodes_of(self, order_id: str, now: datetime, limit: int) -> list[SpiffeId]:
        """Nodes through which was issued what that order revoked and has not expired by `now`."""
        c = credentials.c
        query = select(c.node_id).where(
            text(ORDERED),
            c.order_id == order_id,
            c.node_id.is_not(None),
            c.not_after > to_micros(now),
        )
        rows = self._connection.execute(query.distinct().limit(limit))
        return [spiffe_id_from(node_id) for node_id in rows.scalars()]

    def count(self, selection: Selection, now: datetime) -> LedgerCount:
        """What the ledger knows of a selection at `now`."""
        return ledger_count.count(self._connection, selection, to_micros(now))

    def revocations(self, ids: Collection[str]) -> list[Revocation]:
        """The revocations among those serials and jtis, expired or not."""
        return [
            revocation_from_row(row)
            for named in _singles(ids)
            for row in self._connection.execute(
                select(*REVOCATION_COLUMNS).where(
                    named, credentials.c.state == CredentialState.REVOKED.value
                )
            )
        ]

    def revoked_unexpired(self, now: datetime) -> list[Revocation]:
        """What is revoked and has not expired by `now`."""
        query = select(*REVOCATION_COLUMNS).where(
            text(DEAD),
            credentials.c.state == CredentialState.REVOKED.value,
            credentials.c.not_after > to_micros(now),
        )
        return [revocation_from_row(row) for row in self._connection.execute(query)]

    def valid_for(self, spiffe_id: SpiffeId, now: datetime) -> list[Credential]:
        """What may be valid of that identity at `now`, newest first."""
        query = (
            select(credentials)
            .where(
                credentials.c.spiffe_id == str(spiffe_id),
                credentials.c.not_after > to_micros(now),
                text(UNREVOKED),
            )
            .order_by(credentials.c.seq.desc())
        )
        return [credential_from_row(row) for row in self._connection.execute(query)]

    def sweep_unconfirmed(self, older_than: datetime, limit: int = STEP) -> int:
        """Mark intents recorded before that and without an outcome UNCONFIRMED, one event each.

        Returns:
            How many; call again while it is `limit`.
        """
        due = (
            select(credentials.c.seq)
            .where(text(UNANSWERED), credentials.c.recorded_at < to_micros(older_than))
            .order_by(credentials.c.recorded_at)
        )
        numbers = self._move(due, text(UNANSWERED), CredentialState.UNCONFIRMED, limit)
        self._audit.append_for(AuditKind.CREDENTIAL_UNCONFIRMED, numbers, self._now)
        return len(numbers)

    def expire(self, now: datetime, limit: int = STEP) -> int:
        """Mark what is past its validity EXPIRED, but not what is revoked.

        An intent without an outcome is swept first, then it can expire.

        Returns:
            How many; call again while it is `limit`.
        """
        due = (
            select(credentials.c.seq)
            .where(text(EXPIRABLE), credentials.c.not_after <= to_micros(now))
            .order_by(credentials.c.not_after)
        )
        return len(self._move(due, text(EXPIRABLE), CredentialState.EXPIRED, limit))

    def _move(
        self,
        due: Select[Any],
        allowed: ColumnElement[bool] | Any,
        state: CredentialState,
        limit: int,
    ) -> Sequence[int]:
        """Put a step of what is due into that state; return the numbers of the rows.

        On PostgreSQL the ledger writes outcomes meanwhile: what it holds is left for another step,
        what is taken here stays as it was read until the commit.
        """
        due_now = self._connection.execute(
            due.limit(limit).with_for_update(skip_locked=True)  # SQLite: alone in any case
        )
        numbers = due_now.scalars().all()
        self._connection.execute(
            update(credentials)
            .where(credentials.c.seq.in_(numbers), allowed)
            .values(state=state.value)
        )
        return numbers


def _singles(ids: Collection[str]) -> list[ColumnElement[bool]]:
    """Conditions that together select these ids, in chunks."""
    wanted = sorted(set(ids))
    return [
        credentials.c.id.in_(wanted[start : start + _CHUNK])
        for start in range(0, len(wanted), _CHUNK)
    ]
