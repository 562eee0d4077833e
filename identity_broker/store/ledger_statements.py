"""The ledger's SQL: few statements, each for many rows.

- One statement carries a whole chunk of rows. The driver gives up Python's interpreter lock once
  per statement, and getting it back from a busy event loop costs more than inserting the rows.
- Chunks have few sizes, so that drivers keep every statement prepared.
- Every statement may run again on the same rows without doing more: an outcome is written where
  there is none yet, and a transition names the states it starts from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeVar

from sqlalchemy import Connection

from identity_broker.domain.credential import CredentialOutcome
from identity_broker.domain.events import AuditKind
from identity_broker.store.mapping import INTENT_COLUMNS, to_micros

T = TypeVar("T")

_COLUMNS = ", ".join(INTENT_COLUMNS)
_KIND = AuditKind.CREDENTIAL_ISSUED.value
_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)

_INTENTS = "INSERT INTO credentials ({columns}, state, digest, comment) VALUES {rows}"
_AUDIT = (
    "WITH v(id, at) AS (VALUES {rows})"
    " INSERT INTO audit_events (at, kind, actor, subject, reason, correlation_id, facts)"
    " SELECT v.at, '{kind}', coalesce(c.node_id, 'broker'), c.id, '',"
    " c.correlation_id, '{{\"spiffe_id\":\"' || c.spiffe_id || '\"}}'"  # no quotes in a SPIFFE ID
    " FROM v JOIN credentials c ON c.id = v.id WHERE c.digest = ''"
)
_ISSUED = (
    "WITH v(id, digest) AS (VALUES {rows})"
    " UPDATE credentials SET digest = v.digest, state = CASE"
    " WHEN state IN ('intent', 'unconfirmed') THEN 'issued' ELSE state END"
    " FROM v WHERE credentials.id = v.id AND credentials.digest = ''"
)
_SUPERSEDED = (
    "UPDATE credentials SET state = 'superseded'"
    " WHERE id IN ({rows}) AND state IN ('issued', 'unconfirmed')"
)


def insert_intents(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert ledger rows (`INTENT_COLUMNS`) in state intent."""
    mark = _mark(connection)
    marks = ", ".join([mark] * len(INTENT_COLUMNS))
    _run(connection, _INTENTS, f"({marks}, 'intent', '', '')", rows)


def write_outcomes(connection: Connection, outcomes: Sequence[CredentialOutcome]) -> None:
    """Write what became of intents, one audit line each, and what they supersede."""
    mark = _mark(connection)
    pair = f"({mark}, {mark})"
    # The audit first: it tells by the missing digest which outcomes are new.
    _run(connection, _AUDIT, pair, [(o.id, to_micros(o.issued_at)) for o in outcomes])
    _run(connection, _ISSUED, pair, [(o.id, o.digest) for o in outcomes])
    # Last: what is superseded may have been issued in this very transaction.
    older = [(o.supersedes,) for o in outcomes if o.supersedes and o.supersedes != o.id]
    _run(connection, _SUPERSEDED, mark, older)


def _run(
    connection: Connection, template: str, marks: str, rows: Sequence[tuple[Any, ...]]
) -> None:
    for chunk in _chunks(rows):
        statement = _statement(template, marks, len(chunk))
        connection.exec_driver_sql(statement, tuple(chain.from_iterable(chunk)))


@cache
def _statement(template: str, marks: str, size: int) -> str:
    return template.format(columns=_COLUMNS, kind=_KIND, rows=", ".join([marks] * size))


def _mark(connection: Connection) -> str:
    return "?" if connection.dialect.paramstyle == "qmark" else "%s"


def _chunks(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    start = 0
    for size in _SIZES:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size
