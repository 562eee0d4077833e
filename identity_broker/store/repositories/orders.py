"""Orders: what was decided to be revoked, and what became of it."""

from __future__ import annotations

from sqlalchemy import Connection, insert, literal, select, text, update

from identity_broker.domain.paging import Page
from identity_broker.domain.revocation import RevocationOrder
from identity_broker.errors import RevocationExists, RevocationNotFound
from identity_broker.store.order_mapping import order_from_row, order_values
from identity_broker.store.order_tables import UNFINISHED, revocation_orders
from identity_broker.store.repositories import page_keys

_LISTED = [
    literal("").label(column.name) if column.name == "statement" else column
    for column in revocation_orders.c
]


class OrderRepository:
    """Stores revocation orders."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, order: RevocationOrder) -> None:
        """Store a new order.

        Raises:
            RevocationExists: another one has its id.
        """
        if self.find(order.id) is not None:
            raise RevocationExists(
                f'there is a revocation "{order.id}" already',
                hint=f"idb revoke status {order.id}",
            )
        self._connection.execute(insert(revocation_orders).values(order_values(order)))

    def update(self, order: RevocationOrder) -> None:
        """Store the order as it is now.

        Raises:
            RevocationNotFound: it was never created.
        """
        changed = self._connection.execute(
            update(revocation_orders)
            .where(revocation_orders.c.id == order.id)
            .values(order_values(order))
        )
        if not changed.rowcount:
            raise _unknown(order.id)

    def find(self, order_id: str) -> RevocationOrder | None:
        """The order with that id, if there is one."""
        query = select(revocation_orders).where(revocation_orders.c.id == order_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else order_from_row(row)

    def get(self, order_id: str) -> RevocationOrder:
        """The order with that id.

        Raises:
            RevocationNotFound: there is none.
        """
        order = self.find(order_id)
        if order is None:
            raise _unknown(order_id)
        return order

    def page(self, before: str, size: int) -> Page[RevocationOrder]:
        """A page, newest first, beginning behind the key `before` (empty: at the newest).

        Without the statements, which are long: `get` has them.

        Raises:
            PageTokenInvalid: `before` is not a key of a page.
        """
        query = select(*_LISTED).order_by(revocation_orders.c.seq.desc()).limit(size + 1)
        if before:
            query = query.where(revocation_orders.c.seq < page_keys.row_number(before))
        rows = list(self._connection.execute(query))
        items = [order_from_row(row) for row in rows[:size]]
        return Page(items, str(rows[size - 1].seq) if len(rows) > size else "")

    def unfinished(self) -> list[RevocationOrder]:
        """Those that are not closed, or not swept; oldest first."""
        query = select(revocation_orders).where(text(UNFINISHED)).order_by(revocation_orders.c.seq)
        return [order_from_row(row) for row in self._connection.execute(query)]


def _unknown(order_id: str) -> RevocationNotFound:
    return RevocationNotFound(f'no revocation has the id "{order_id[:64]}"')
