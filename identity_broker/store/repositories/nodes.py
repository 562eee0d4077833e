"""Attested nodes. Every change appends its outbox row; what is on hold is stored banned."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from identity_broker.domain.credential import CredentialState
from identity_broker.domain.events import Topic
from identity_broker.domain.node import Node
from identity_broker.domain.paging import NodeFilter, Page
from identity_broker.domain.selection import Selection
from identity_broker.errors import NodeNotFound
from identity_broker.store.mapping import node_from_row, node_values, spiffe_id_from, to_micros
from identity_broker.store.repositories import page_keys, selected
from identity_broker.store.repositories.lasting_holds import LastingHolds
from identity_broker.store.repositories.outbox import OutboxRepository
from identity_broker.store.steps import STEP
from identity_broker.store.tables import credentials, nodes
from identity_ca.spiffe_id import SpiffeId

_UPDATE = update(nodes).where(nodes.c.spiffe_id == bindparam("node_id"))
_INSERT = insert(nodes)


class NodeRepository:
    """Stores nodes."""

    def __init__(
        self, connection: Connection, outbox: OutboxRepository, lasting: LastingHolds
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._lasting = lasting

    def upsert(self, node: Node) -> None:
        """Store the node, whether or not it was known; banned when a hold covers it."""
        values = node_values(self._lasting.applied_to(node))
        changed = self._connection.execute(_UPDATE, {**values, "node_id": values["spiffe_id"]})
        if not changed.rowcount:
            self._connection.execute(_INSERT, values)
        self._outbox.append(Topic.NODE, values["spiffe_id"])

    def find(self, node_id: SpiffeId) -> Node | None:
        """The node with that SPIFFE ID, if it is known."""
        query = select(nodes).where(nodes.c.spiffe_id == str(node_id))
        row = self._connection.execute(query).one_or_none()
        return None if row is None else node_from_row(row)

    def get(self, node_id: SpiffeId) -> Node:
        """The node with that SPIFFE ID.

        Raises:
            NodeNotFound: there is none.
        """
        node = self.find(node_id)
        if node is None:
            raise NodeNotFound(f'no node has the SPIFFE ID "{node_id}"')
        return node

    def delete(self, node_id: SpiffeId) -> Node:
        """Remove the node; return what it was.

        Raises:
            NodeNotFound: there is none.
        """
        node = self.get(node_id)
        self._connection.execute(delete(nodes).where(nodes.c.spiffe_id == str(node_id)))
        self._outbox.append(Topic.NODE, str(node_id))
        return node

    def prune(self, expired_before: datetime, limit: int = STEP) -> int:
        """Remove nodes whose SVID expired before that; a banned one stays, and stays banned.

        Returns:
            How many; call again while it is `limit`.
        """
        gone = [nodes.c.expires_at < to_micros(expired_before), nodes.c.banned.is_(False)]
        due = select(nodes.c.spiffe_id).where(*gone).order_by(nodes.c.expires_at).limit(limit)
        ids = self._connection.execute(due).scalars().all()
        self._connection.execute(delete(nodes).where(nodes.c.spiffe_id.in_(ids), *gone))
        self._outbox.append_all(Topic.NODE, ids)
        return len(ids)

    def page(self, wanted: NodeFilter, after: str, size: int) -> Page[Node]:
        """A page in the order of SPIFFE IDs, beginning behind `after` (empty: at the first).

        Raises:
            PageTokenInvalid: `after` is not a key of a page.
        """
        query = select(nodes).where(nodes.c.spiffe_id > page_keys.node_id(after))
        if wanted.attestor:
            query = query.where(nodes.c.attestor == wanted.attestor)
        if wanted.banned is not None:
            query = query.where(nodes.c.banned == wanted.banned)
        rows = list(self._connection.execute(query.order_by(nodes.c.spiffe_id).limit(size + 1)))
        items = [node_from_row(row) for row in rows[:size]]
        return Page(items, str(items[-1].spiffe_id) if len(rows) > size else "")

    def stranded_by(
        self, selection: Selection, now: datetime, size: int
    ) -> tuple[tuple[SpiffeId, ...], int]:
        """The nodes that revoking the selection would leave without an SVID and without a way back.

        Their own SVID is selected and may be valid at `now`, they cannot attest again by
        themselves, and they are not banned.

        Returns:
            The first `size` of them by SPIFFE ID, and how many there are.
        """
        own = (
            select(credentials.c.id)
            .where(
                credentials.c.id == nodes.c.serial,
                *selected.of_credentials(selection, self._connection.dialect),
                credentials.c.not_after > to_micros(now),
                credentials.c.state != CredentialState.REVOKED.value,
            )
            .correlate(nodes)
            .exists()
        )
        lost = [nodes.c.reattestable.is_(False), nodes.c.banned.is_(False), own]
        number = self._connection.execute(select(func.count()).select_from(nodes).where(*lost))
        ids = self._connection.execute(
            select(nodes.c.spiffe_id).where(*lost).order_by(nodes.c.spiffe_id).limit(size)
        )
        return tuple(map(spiffe_id_from, ids.scalars())), int(number.scalar_one())

    def all(self) -> list[Node]:
        """Every node."""
        return [
            node_from_row(row)
            for row in self._connection.execute(select(nodes).order_by(nodes.c.spiffe_id))
        ]
