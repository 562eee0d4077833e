"""A selection as SQL, on the ledger and on entries: what `Selection` says, word for word.

- Some selections find their rows by an index of the ledger. The others (a key, an authority, a
  prefix, a time) look through what is live: no index is kept for them that every issuance would
  have to write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Dialect, and_, cast, false, func, or_, select, text
from sqlalchemy.dialects.postgresql import JSONB

from identity_broker.domain.credential import (
    CredentialKind,
    CredentialState,
    RevocationReason,
)
from identity_broker.domain.selection import Selection
from identity_broker.store.mapping import to_micros
from identity_broker.store.tables import (
    DEAD,
    EXPIRABLE,
    UNANSWERED,
    UNREVOKED,
    credentials,
    entries,
)

Condition = ColumnElement[bool] | Any


def is_indexed(selection: Selection) -> bool:
    """Whether an index of the ledger finds its rows."""
    return bool(
        selection.singles_out
        or selection.spiffe_id
        or selection.node_id
        or selection.entry_id
        or selection.names_entry_fields
    )


def of_credentials(selection: Selection, dialect: Dialect) -> list[Condition]:
    """The conditions on a row of `credentials`, which together select it."""
    c = credentials.c
    found: list[Condition] = [column == wanted for column, wanted in _exact(selection) if wanted]
    if selection.spiffe_id_prefix:
        found.append(_begins(c.spiffe_id, selection.spiffe_id_prefix))
    if selection.names_entry_fields:
        named = select(entries.c.id).where(*_entry_fields(selection, dialect))
        found.append(c.entry_id.in_(named))
    if selection.entry_id or selection.names_entry_fields:
        found.append(text("entry_id <> ''"))  # for SQLite to see that the index applies
    if selection.issued_after is not None:
        found.append(c.recorded_at >= to_micros(selection.issued_after))
    if selection.issued_before is not None:
        found.append(c.recorded_at < to_micros(selection.issued_before))
    return found


def _exact(selection: Selection) -> Iterator[tuple[ColumnElement[str], str]]:
    c = credentials.c
    yield c.id, selection.serial
    yield c.kind, CredentialKind.X509.value if selection.serial else ""
    yield c.id, selection.jti
    yield c.kind, CredentialKind.JWT.value if selection.jti else ""
    yield c.spiffe_id, _text(selection.spiffe_id)
    yield c.node_id, _text(selection.node_id)
    yield c.entry_id, selection.entry_id
    yield c.kind, _text(selection.kind)
    yield c.instance, selection.instance
    yield c.authority_id, selection.authority_id
    yield c.key_fingerprint, selection.key_fingerprint


def _text(value: object) -> str:
    return "" if value is None else str(value)


def revocable(
    selection: Selection, dialect: Dialect, moment: int, reason: RevocationReason | None
) -> list[list[Condition]]:
    """Lists of conditions: a row that all of one list select is selected and may be revoked.

    Args:
        moment: now, in microseconds: what has expired by then is left out.
        reason: what for; a better one than certificateHold takes in what is on hold. None: that is
            left out.
    """
    c = credentials.c
    wanted = [*of_credentials(selection, dialect), c.not_after > moment]
    if is_indexed(selection):
        return [[*wanted, or_(text(UNREVOKED), on_hold(reason))]]
    ended = or_(c.state == CredentialState.EXPIRED.value, on_hold(reason))
    return [[text(EXPIRABLE), *wanted], [text(UNANSWERED), *wanted], [text(DEAD), ended, *wanted]]


def revoked(selection: Selection, dialect: Dialect, moment: int) -> list[Condition]:
    """The conditions that select what is revoked and has not expired at `moment`."""
    c = credentials.c
    return [
        *of_credentials(selection, dialect),
        c.not_after > moment,
        c.state == CredentialState.REVOKED.value,
        *([] if is_indexed(selection) else [text(DEAD)]),
    ]


def on_hold(reason: RevocationReason | None) -> Condition:
    """The condition that a row is on certificateHold and would not be for that reason."""
    if reason in (None, RevocationReason.CERTIFICATE_HOLD):
        return false()
    return and_(
        credentials.c.state == CredentialState.REVOKED.value,
        credentials.c.reason == int(RevocationReason.CERTIFICATE_HOLD),
    )


def of_entries(selection: Selection, dialect: Dialect) -> list[Condition] | None:
    """The conditions on a row of `entries`; None where `Selection.covers_entry` has no answer."""
    if not selection.is_of_entries:
        return None
    found = _entry_fields(selection, dialect)
    if selection.spiffe_id is not None:
        found.append(entries.c.spiffe_id == str(selection.spiffe_id))
    if selection.spiffe_id_prefix:
        found.append(_begins(entries.c.spiffe_id, selection.spiffe_id_prefix))
    if selection.entry_id:
        found.append(entries.c.id == selection.entry_id)
    return found


def _begins(column: ColumnElement[str], prefix: str) -> Condition:
    # Neither LIKE, which folds letters on SQLite, nor a range, which PostgreSQL's collation bends.
    return func.substr(column, 1, len(prefix)) == prefix


def _entry_fields(selection: Selection, dialect: Dialect) -> list[Condition]:
    found: list[Condition] = []
    if selection.owner:
        found.append(entries.c.owner == selection.owner)
    for key, value in selection.labels:
        if dialect.name == "postgresql":
            stored = cast(entries.c.labels, JSONB)[key].astext
        else:
            stored = func.json_extract(entries.c.labels, f'$."{key}"')
        found.append(stored == value)
    return found
