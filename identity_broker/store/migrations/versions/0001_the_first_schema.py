"""The first schema: entries, nodes, join tokens, ledger, authorities, audit log and outbox."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


_APPEND_ONLY = "the audit log is append-only"

_SQLITE_TRIGGERS = tuple(
    f"CREATE TRIGGER audit_events_no_{verb} BEFORE {verb} ON audit_events"
    f" BEGIN SELECT RAISE(ABORT, '{_APPEND_ONLY}'); END"
    for verb in ("update", "delete")
)
_POSTGRESQL_TRIGGERS = (
    "CREATE FUNCTION audit_events_append_only() RETURNS trigger LANGUAGE plpgsql AS"
    f" $$ BEGIN RAISE EXCEPTION '{_APPEND_ONLY}'; END $$",
    "CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events"
    " FOR EACH STATEMENT EXECUTE FUNCTION audit_events_append_only()",
)


def upgrade() -> None:
    """Apply this step."""
    op.create_table(
        "audit_events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.CheckConstraint("kind <> ''", name=op.f("ck_audit_events_kind")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_events")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "authorities",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("public_key_der", sa.LargeBinary(), nullable=False),
        sa.Column("chain", sa.Text(), nullable=False),
        sa.Column("roots", sa.Text(), nullable=False),
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('x509', 'jwt')", name=op.f("ck_authorities_kind")),
        sa.CheckConstraint(
            "state IN ('prepared', 'active', 'old', 'tainted', 'revoked')",
            name=op.f("ck_authorities_state"),
        ),
        sa.CheckConstraint("not_after > not_before", name=op.f("ck_authorities_validity")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_authorities")),
        sa.UniqueConstraint("kind", "position", name="uq_authorities_position"),
    )
    op.create_index(
        "uq_authorities_active",
        "authorities",
        ["kind"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_index(
        "uq_authorities_prepared",
        "authorities",
        ["kind"],
        unique=True,
        sqlite_where=sa.text("state = 'prepared'"),
        postgresql_where=sa.text("state = 'prepared'"),
    )
    op.create_table(
        "authority_sets",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('x509', 'jwt')", name=op.f("ck_authority_sets_kind")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_authority_sets_version")),
        sa.PrimaryKeyConstraint("kind", name=op.f("pk_authority_sets")),
    )
    op.create_table(
        "credentials",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("spiffe_id", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.Text(), nullable=False),
        sa.Column("entry_revision", sa.BigInteger(), nullable=False),
        sa.Column("node_id", sa.Text(), nullable=True),
        sa.Column("authority_id", sa.Text(), nullable=False),
        sa.Column("key_fingerprint", sa.Text(), nullable=False),
        sa.Column("tbs_digest", sa.Text(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger(), nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Integer(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "(state = 'revoked') = (revoked_at IS NOT NULL)"
            " AND (state = 'revoked') = (reason IS NOT NULL)",
            name=op.f("ck_credentials_revoked"),
        ),
        sa.CheckConstraint("kind IN ('x509', 'jwt')", name=op.f("ck_credentials_kind")),
        sa.CheckConstraint("state <> 'issued' OR digest <> ''", name=op.f("ck_credentials_issued")),
        sa.CheckConstraint(
            "state IN ('intent', 'issued', 'unconfirmed', 'superseded', 'revoked', 'expired')",
            name=op.f("ck_credentials_state"),
        ),
        sa.CheckConstraint("length(id) > 0", name=op.f("ck_credentials_id")),
        sa.CheckConstraint("not_after > not_before", name=op.f("ck_credentials_validity")),
        sa.CheckConstraint(
            "reason IS NULL OR reason IN (0, 1, 2, 3, 4, 5, 9)", name=op.f("ck_credentials_reason")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_credentials")),
        sa.UniqueConstraint("id", name="uq_credentials_id"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_credentials_dead",
        "credentials",
        ["not_after"],
        unique=False,
        sqlite_where=sa.text("state IN ('revoked', 'expired')"),
        postgresql_where=sa.text("state IN ('revoked', 'expired')"),
    )
    op.create_index(
        "ix_credentials_entry_id",
        "credentials",
        ["entry_id", "seq"],
        unique=False,
        sqlite_where=sa.text("entry_id <> ''"),
        postgresql_where=sa.text("entry_id <> ''"),
    )
    op.create_index(
        "ix_credentials_expirable",
        "credentials",
        ["not_after"],
        unique=False,
        sqlite_where=sa.text("state IN ('issued', 'unconfirmed', 'superseded')"),
        postgresql_where=sa.text("state IN ('issued', 'unconfirmed', 'superseded')"),
    )
    op.create_index(
        "ix_credentials_node_id",
        "credentials",
        ["node_id", "seq"],
        unique=False,
        sqlite_where=sa.text("node_id IS NOT NULL"),
        postgresql_where=sa.text("node_id IS NOT NULL"),
    )
    op.create_index("ix_credentials_spiffe_id", "credentials", ["spiffe_id", "seq"], unique=False)
    op.create_index(
        "ix_credentials_unanswered",
        "credentials",
        ["recorded_at"],
        unique=False,
        sqlite_where=sa.text("state = 'intent'"),
        postgresql_where=sa.text("state = 'intent'"),
    )
    op.create_table(
        "join_tokens",
        sa.Column("token_hash", sa.Text(), nullable=False),
        sa.Column("node_id", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("expires_at > created_at", name=op.f("ck_join_tokens_times")),
        sa.CheckConstraint("length(token_hash) = 64", name=op.f("ck_join_tokens_token_hash")),
        sa.CheckConstraint(
            "used_at IS NULL OR used_at < expires_at", name=op.f("ck_join_tokens_used_at")
        ),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_join_tokens")),
    )
    op.create_index("ix_join_tokens_expires_at", "join_tokens", ["expires_at"], unique=False)
    op.create_table(
        "nodes",
        sa.Column("spiffe_id", sa.Text(), nullable=False),
        sa.Column("attestor", sa.Text(), nullable=False),
        sa.Column("selectors", sa.Text(), nullable=False),
        sa.Column("attested_at", sa.BigInteger(), nullable=False),
        sa.Column("serial", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("reattestable", sa.Boolean(), nullable=False),
        sa.Column("banned", sa.Boolean(), nullable=False),
        sa.Column("ban_reason", sa.Text(), nullable=False),
        sa.CheckConstraint("banned OR ban_reason = ''", name=op.f("ck_nodes_ban_reason")),
        sa.PrimaryKeyConstraint("spiffe_id", name=op.f("pk_nodes")),
    )
    op.create_table(
        "outbox",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "topic IN ('entry', 'node', 'revocation', 'authority')", name=op.f("ck_outbox_topic")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_outbox")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "spiffe_ids",
        sa.Column("folded", sa.Text(), nullable=False),
        sa.Column("spelling", sa.Text(), nullable=False),
        sa.CheckConstraint("folded = lower(spelling)", name=op.f("ck_spiffe_ids_folded")),
        sa.PrimaryKeyConstraint("folded", name=op.f("pk_spiffe_ids")),
        sa.UniqueConstraint("spelling", name="uq_spiffe_ids_spelling"),
    )
    op.create_table(
        "entries",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("spiffe_id", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=False),
        sa.Column("identity_key", sa.Text(), nullable=False),
        sa.Column("x509_ttl", sa.BigInteger(), nullable=True),
        sa.Column("jwt_ttl", sa.BigInteger(), nullable=True),
        sa.Column("dns_names", sa.Text(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.Column("hint_key", sa.Text(), nullable=True),
        sa.Column("federates_with", sa.Text(), nullable=False),
        sa.Column("admin", sa.Boolean(), nullable=False),
        sa.Column("downstream", sa.Boolean(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("(hint = '') = (hint_key IS NULL)", name=op.f("ck_entries_hint_key")),
        sa.CheckConstraint("jwt_ttl IS NULL OR jwt_ttl > 0", name=op.f("ck_entries_jwt_ttl")),
        sa.CheckConstraint("length(id) BETWEEN 1 AND 64", name=op.f("ck_entries_id")),
        sa.CheckConstraint("length(identity_key) = 64", name=op.f("ck_entries_identity_key")),
        sa.CheckConstraint("revision >= 1", name=op.f("ck_entries_revision")),
        sa.CheckConstraint("spiffe_id <> parent_id", name=op.f("ck_entries_parent")),
        sa.CheckConstraint("updated_at >= created_at", name=op.f("ck_entries_times")),
        sa.CheckConstraint("x509_ttl IS NULL OR x509_ttl > 0", name=op.f("ck_entries_x509_ttl")),
        sa.ForeignKeyConstraint(
            ["spiffe_id"], ["spiffe_ids.spelling"], name="fk_entries_spiffe_id_spiffe_ids"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_entries")),
        sa.UniqueConstraint("hint_key", name="uq_entries_hint_key"),
        sa.UniqueConstraint("identity_key", name="uq_entries_identity_key"),
    )
    op.create_index("ix_entries_parent_id", "entries", ["parent_id"], unique=False)
    op.create_index("ix_entries_spiffe_id", "entries", ["spiffe_id"], unique=False)
    op.create_table(
        "entry_selectors",
        sa.Column("entry_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_entry_selectors_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("entry_id", "type", "value", name=op.f("pk_entry_selectors")),
    )
    op.create_index(
        "ix_entry_selectors_selector", "entry_selectors", ["type", "value"], unique=False
    )
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in _SQLITE_TRIGGERS if is_sqlite else _POSTGRESQL_TRIGGERS:
        op.execute(statement)


def downgrade() -> None:
    """Undo this step."""
    op.drop_index("ix_entry_selectors_selector", table_name="entry_selectors")
    op.drop_table("entry_selectors")
    op.drop_index("ix_entries_spiffe_id", table_name="entries")
    op.drop_index("ix_entries_parent_id", table_name="entries")
    op.drop_table("entries")
    op.drop_table("spiffe_ids")
    op.drop_table("outbox")
    op.drop_table("nodes")
    op.drop_index("ix_join_tokens_expires_at", table_name="join_tokens")
    op.drop_table("join_tokens")
    op.drop_index(
        "ix_credentials_unanswered",
        table_name="credentials",
        sqlite_where=sa.text("state = 'intent'"),
        postgresql_where=sa.text("state = 'intent'"),
    )
    op.drop_index("ix_credentials_spiffe_id", table_name="credentials")
    op.drop_index(
        "ix_credentials_node_id",
        table_name="credentials",
        sqlite_where=sa.text("node_id IS NOT NULL"),
        postgresql_where=sa.text("node_id IS NOT NULL"),
    )
    op.drop_index(
        "ix_credentials_expirable",
        table_name="credentials",
        sqlite_where=sa.text("state IN ('issued', 'unconfirmed', 'superseded')"),
        postgresql_where=sa.text("state IN ('issued', 'unconfirmed', 'superseded')"),
    )
    op.drop_index(
        "ix_credentials_entry_id",
        table_name="credentials",
        sqlite_where=sa.text("entry_id <> ''"),
        postgresql_where=sa.text("entry_id <> ''"),
    )
    op.drop_index(
        "ix_credentials_dead",
        table_name="credentials",
        sqlite_where=sa.text("state IN ('revoked', 'expired')"),
        postgresql_where=sa.text("state IN ('revoked', 'expired')"),
    )
    op.drop_table("credentials")
    op.drop_table("authority_sets")
    op.drop_index(
        "uq_authorities_prepared",
        table_name="authorities",
        sqlite_where=sa.text("state = 'prepared'"),
        postgresql_where=sa.text("state = 'prepared'"),
    )
    op.drop_index(
        "uq_authorities_active",
        table_name="authorities",
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.drop_table("authorities")
    op.drop_table("audit_events")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_events_append_only()")
