"""Alembic's entry point: works on the connection and transaction `store.schema` hands in."""

from __future__ import annotations

from alembic import context

from identity_broker.store import order_tables  # noqa: F401  # adds its tables to the catalogue
from identity_broker.store.tables import Row

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Row.metadata,
    transactional_ddl=True,
    compare_type=True,
    compare_server_default=True,
    render_as_batch=False,
)
with context.begin_transaction():
    context.run_migrations()
