"""How many credentials a selection has, and whose they are: what a revocation would hit."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import Connection, Select, func, select, text, union_all

from identity_broker.domain.credential import CredentialKind
from identity_broker.domain.revocation import IdentityCount, LedgerCount
from identity_broker.domain.selection import Selection
from identity_broker.store.mapping import spiffe_id_from
from identity_broker.store.repositories import selected
from identity_broker.store.tables import DEAD, EXPIRABLE, UNANSWERED, credentials

SHOWN_IDENTITIES = 20
SHOWN_NODES = 100
LOOKED_AT = 100_000
"""Expired rows that are looked at for a selection that no index knows."""


def count(connection: Connection, selection: Selection, moment: int) -> LedgerCount:
    """Count a selection; `moment` is now, in microseconds."""
    c = credentials.c
    dialect = connection.dialect
    parts = [
        select(c.spiffe_id, c.kind, c.node_id).where(*conditions)
        for conditions in selected.revocable(selection, dialect, moment, None)
    ]
    live = union_all(*parts).subquery()
    rows = connection.execute(
        select(live.c.spiffe_id, live.c.kind, func.count()).group_by(live.c.spiffe_id, live.c.kind)
    )
    kinds: Counter[str] = Counter()
    identities: Counter[str] = Counter()
    for spiffe_id, kind, number in rows:
        kinds[kind] += number
        identities[spiffe_id] += number
    through = select(live.c.node_id, func.count()).where(live.c.node_id.is_not(None))
    nodes = Counter(
        {row[0]: row[1] for row in connection.execute(through.group_by(live.c.node_id))}
    )
    return LedgerCount(
        live_x509=kinds[CredentialKind.X509.value],
        live_jwt=kinds[CredentialKind.JWT.value],
        already_revoked=_number(
            connection,
            select(func.count())
            .select_from(credentials)
            .where(*selected.revoked(selection, dialect, moment)),
        ),
        expired=_number(connection, _expired(selection, connection, moment)),
        identities=tuple(
            IdentityCount(spiffe_id_from(spiffe_id), number)
            for spiffe_id, number in _most(identities, SHOWN_IDENTITIES)
        ),
        identity_count=len(identities),
        node_ids=tuple(spiffe_id_from(node_id) for node_id, _ in _most(nodes, SHOWN_NODES)),
        node_count=len(nodes),
    )


def _most(counted: Counter[str], size: int) -> list[tuple[str, int]]:
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:size]


def _number(connection: Connection, query: Select[Any]) -> int:
    return int(connection.execute(query).scalar_one())


def _expired(selection: Selection, connection: Connection, moment: int) -> Select[Any]:
    c = credentials.c
    conditions = selected.of_credentials(selection, connection.dialect)
    if selected.is_indexed(selection):
        conditions.append(c.not_after <= moment)
    else:
        # By the indexes of what is marked expired, of what is still to be, and of what never was.
        newest = [
            select(
                select(c.seq)
                .where(text(state), c.not_after <= moment)
                .order_by(c.not_after.desc())
                .limit(LOOKED_AT)
                .subquery()
            )
            for state in (DEAD, EXPIRABLE, UNANSWERED)
        ]
        conditions.append(c.seq.in_(union_all(*newest)))
    return select(func.count()).select_from(credentials).where(*conditions)
