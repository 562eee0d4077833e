"""Orders, holds, blocked keys, epochs and CRL numbers; the ledger knows which order revoked a row.

The previous release can run on this schema until the first certificateHold, hold, epoch or blocked
key is recorded: it does not know what that means.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_KINDS = "'spiffe-id', 'serial', 'jti', 'node', 'entry', 'key-fingerprint', 'authority', 'select'"
# Wide enough never to be changed again: reasons are RFC 5280's, topics are the code's to check.
_OLD_REASON = "reason IS NULL OR reason IN (0, 1, 2, 3, 4, 5, 9)"
_REASON = "reason IS NULL OR reason BETWEEN 0 AND 10"
_OLD_TOPIC = "topic IN ('entry', 'node', 'revocation', 'authority')"
_TOPIC = "topic <> ''"


def upgrade() -> None:
    """Apply this step."""
    # With a default on the server no row is rewritten, however long the ledger is.
    _add_text("credentials", "order_id")
    _add_text("entries", "held_by")
    op.create_index(
        "ix_credentials_order_id",
        "credentials",
        ["order_id", "seq"],
        sqlite_where=sa.text("order_id <> ''"),
        postgresql_where=sa.text("order_id <> ''"),
    )
    op.create_index(
        "ix_entries_held_by",
        "entries",
        ["held_by"],
        sqlite_where=sa.text("held_by <> ''"),
        postgresql_where=sa.text("held_by <> ''"),
    )
    _create_orders()
    _create_holds()
    op.create_table(
        "blocked_keys",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("order_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Integer(), nullable=False),
        sa.Column("blocked_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("length(fingerprint) = 64", name=op.f("ck_blocked_keys_fingerprint")),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_blocked_keys")),
    )
    op.create_table(
        "identity_epochs",
        sa.Column("spiffe_id", sa.Text(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("expires_at >= not_before", name=op.f("ck_identity_epochs_times")),
        sa.PrimaryKeyConstraint("spiffe_id", name=op.f("pk_identity_epochs")),
    )
    op.create_index("ix_identity_epochs_expires_at", "identity_epochs", ["expires_at"])
    op.create_table(
        "crl_numbers",
        sa.Column("authority_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("number >= 0", name=op.f("ck_crl_numbers_number")),
        sa.PrimaryKeyConstraint("authority_id", name=op.f("pk_crl_numbers")),
    )
    _replace_check("credentials", "ck_credentials_reason", _OLD_REASON, _REASON)
    _replace_check("outbox", "ck_outbox_topic", _OLD_TOPIC, _TOPIC)


def downgrade() -> None:
    """Undo this step."""
    op.execute("UPDATE credentials SET reason = 0 WHERE reason = 6")
    op.execute("DELETE FROM outbox WHERE topic IN ('epoch', 'hold', 'key')")
    _replace_check("outbox", "ck_outbox_topic", _TOPIC, _OLD_TOPIC)
    _replace_check("credentials", "ck_credentials_reason", _REASON, _OLD_REASON)
    op.drop_table("crl_numbers")
    op.drop_table("identity_epochs")
    op.drop_table("blocked_keys")
    op.drop_table("holds")
    op.drop_table("revocation_orders")
    op.drop_index("ix_entries_held_by", table_name="entries")
    op.drop_index("ix_credentials_order_id", table_name="credentials")
    op.drop_column("entries", "held_by")
    op.drop_column("credentials", "order_id")


def _add_text(table: str, column: str) -> None:
    op.add_column(table, sa.Column(column, sa.Text(), server_default=sa.text("''"), nullable=False))


def _number() -> sa.Column[int]:
    return sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False)


def _create_orders() -> None:
    op.create_table(
        "revocation_orders",
        _number(),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("reason", sa.Integer(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("ordered_at", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("committed_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked", sa.BigInteger(), nullable=False),
        sa.Column("already_revoked", sa.BigInteger(), nullable=False),
        sa.Column("expired", sa.BigInteger(), nullable=False),
        sa.Column("released", sa.BigInteger(), nullable=False),
        sa.Column("hold", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("swept", sa.Boolean(), nullable=False),
        sa.Column("statement", sa.Text(), nullable=False),
        sa.CheckConstraint("length(id) BETWEEN 1 AND 64", name=op.f("ck_revocation_orders_id")),
        sa.CheckConstraint(f"kind IN ({_KINDS})", name=op.f("ck_revocation_orders_kind")),
        sa.CheckConstraint(
            "state IN ('running', 'committed', 'closed')", name=op.f("ck_revocation_orders_state")
        ),
        sa.CheckConstraint(
            "(state = 'running') = (committed_at IS NULL)",
            name=op.f("ck_revocation_orders_committed"),
        ),
        sa.CheckConstraint(
            "(state = 'closed') = (statement <> '')", name=op.f("ck_revocation_orders_closed")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_revocation_orders")),
        sa.UniqueConstraint("id", name="uq_revocation_orders_id"),
        sqlite_autoincrement=True,
    )
    unfinished = sa.text("state <> 'closed' OR NOT swept")
    op.create_index(
        "ix_revocation_orders_unfinished",
        "revocation_orders",
        ["seq"],
        sqlite_where=unfinished,
        postgresql_where=unfinished,
    )


def _create_holds() -> None:
    op.create_table(
        "holds",
        _number(),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("order_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Integer(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=True),
        sa.Column("lifted_at", sa.BigInteger(), nullable=True),
        sa.Column("lifted_by", sa.Text(), nullable=False),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 64", name=op.f("ck_holds_name")),
        sa.CheckConstraint(f"kind IN ({_KINDS})", name=op.f("ck_holds_kind")),
        sa.CheckConstraint("(lifted_at IS NULL) = (lifted_by = '')", name=op.f("ck_holds_lifted")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_holds")),
        sa.UniqueConstraint("name", name="uq_holds_name"),
        sqlite_autoincrement=True,
    )
    lasting = sa.text("lifted_at IS NULL")
    op.create_index(
        "ix_holds_lasting", "holds", ["seq"], sqlite_where=lasting, postgresql_where=lasting
    )


def _replace_check(table: str, name: str, old: str, new: str) -> None:
    """Put one condition in the place of another."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.drop_constraint(op.f(name), table)
        op.create_check_constraint(op.f(name), table, new)
        return
    # SQLite would have to copy the whole ledger. A CHECK has no part in how rows are stored: its
    # text may be replaced (SQLite's "ALTER TABLE", section 7).
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    changed = connection.execute(
        sa.text(
            "UPDATE sqlite_master SET sql = replace(sql, :old, :new)"
            " WHERE type = 'table' AND name = :name AND instr(sql, :old) > 0"
        ),
        {
            "old": f"CONSTRAINT {name} CHECK ({old})",
            "new": f"CONSTRAINT {name} CHECK ({new})",
            "name": table,
        },
    )
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
    if changed.rowcount != 1:
        raise RuntimeError(f"the table {table} has no constraint {name} as 0001 made it")
