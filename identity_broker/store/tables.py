"""The tables, and the constraints that make bad states impossible.

- Rows never leave `store/`; `mapping` turns them into domain values and back.
- Instants and durations are integers, microseconds (since the epoch, UTC): exact on both databases.
- Ledger, outbox and audit rows are numbered; numbers are never used twice.
- Every constraint and index is named, so that migrations and error reports can name it too.
- The predicates of partial indexes are shared constants: a query must repeat them word for word
  for SQLite to see that the index applies.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlmodel import Field, SQLModel

from identity_broker.domain.credential import CredentialKind, CredentialState
from identity_ca.authority import AuthorityKind, AuthorityState

UNREVOKED = "state <> 'revoked'"
"""A credential that can be revoked as long as its validity lasts. An expired one may be valid
again: the clock that expired it may have been wrong."""
DEAD = "state IN ('revoked', 'expired')"
EXPIRABLE = "state IN ('issued', 'unconfirmed', 'superseded')"
UNANSWERED = "state = 'intent'"
ORDERED = "order_id <> ''"
HELD = "held_by <> ''"

# SQLite numbers rows by its 64-bit rowid only for the exact type INTEGER.
Number = BigInteger().with_variant(Integer(), "sqlite")


def one_of(column: str, values: Any) -> str:
    """The condition that a column holds a value of an enum."""
    return f"{column} IN ({', '.join(repr(value.value) for value in values)})"


class Row(SQLModel):
    """Base of every table, with a catalogue of its own."""

    metadata: ClassVar[MetaData] = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class SpiffeIdRow(Row, table=True):
    """The one spelling under which an ID is registered. `folded` is the ID in lower case."""

    __tablename__ = "spiffe_ids"
    __table_args__ = (
        CheckConstraint("folded = lower(spelling)", name="folded"),
        UniqueConstraint("spelling", name="uq_spiffe_ids_spelling"),
    )

    folded: str = Field(sa_type=Text, primary_key=True)
    spelling: str = Field(sa_type=Text, nullable=False)


class EntryRow(Row, table=True):
    """A registration entry; its selectors stand in `entry_selectors`.

    `identity_key` digests SPIFFE ID, parent and selectors; `hint_key` parent and hint, where there
    is a hint: together they can be longer than what PostgreSQL indexes (2,704 bytes).
    """

    __tablename__ = "entries"
    __table_args__ = (
        UniqueConstraint("identity_key", name="uq_entries_identity_key"),
        UniqueConstraint("hint_key", name="uq_entries_hint_key"),
        Index("ix_entries_spiffe_id", "spiffe_id"),
        Index("ix_entries_parent_id", "parent_id"),
        Index(
            "ix_entries_held_by",
            "held_by",
            sqlite_where=text(HELD),
            postgresql_where=text(HELD),
        ),
        CheckConstraint("length(id) BETWEEN 1 AND 64", name="id"),
        CheckConstraint("spiffe_id <> parent_id", name="parent"),
        CheckConstraint("length(identity_key) = 64", name="identity_key"),
        CheckConstraint("(hint = '') = (hint_key IS NULL)", name="hint_key"),
        CheckConstraint("x509_ttl IS NULL OR x509_ttl > 0", name="x509_ttl"),
        CheckConstraint("jwt_ttl IS NULL OR jwt_ttl > 0", name="jwt_ttl"),
        CheckConstraint("revision >= 1", name="revision"),
        CheckConstraint("updated_at >= created_at", name="times"),
    )

    id: str = Field(sa_type=Text, primary_key=True)
    spiffe_id: str = Field(
        sa_type=Text,
        nullable=False,
        sa_column_args=[ForeignKey("spiffe_ids.spelling", name="fk_entries_spiffe_id_spiffe_ids")],
    )
    parent_id: str = Field(sa_type=Text, nullable=False)
    identity_key: str = Field(sa_type=Text, nullable=False)
    x509_ttl: int | None = Field(sa_type=BigInteger, nullable=True)
    jwt_ttl: int | None = Field(sa_type=BigInteger, nullable=True)
    dns_names: str = Field(sa_type=Text, nullable=False)
    hint: str = Field(sa_type=Text, nullable=False)
    hint_key: str | None = Field(sa_type=Text, nullable=True)
    federates_with: str = Field(sa_type=Text, nullable=False)
    admin: bool = Field(nullable=False)
    downstream: bool = Field(nullable=False)
    disabled: bool = Field(nullable=False)
    expires_at: int | None = Field(sa_type=BigInteger, nullable=True)
    owner: str = Field(sa_type=Text, nullable=False)
    labels: str = Field(sa_type=Text, nullable=False)
    per_process: bool = Field(
        default=False, nullable=False, sa_column_kwargs={"server_default": false()}
    )
    key_algorithm: str = Field(
        default="", sa_type=Text, nullable=False, sa_column_kwargs={"server_default": text("''")}
    )
    held_by: str = Field(
        default="", sa_type=Text, nullable=False, sa_column_kwargs={"server_default": text("''")}
    )
    revision: int = Field(sa_type=BigInteger, nullable=False)
    created_at: int = Field(sa_type=BigInteger, nullable=False)
    updated_at: int = Field(sa_type=BigInteger, nullable=False)


class EntrySelectorRow(Row, table=True):
    """One selector of an entry."""

    __tablename__ = "entry_selectors"
    __table_args__ = (Index("ix_entry_selectors_selector", "type", "value"),)

    entry_id: str = Field(
        sa_type=Text,
        primary_key=True,
        sa_column_args=[
            ForeignKey("entries.id", ondelete="CASCADE", name="fk_entry_selectors_entry_id_entries")
        ],
    )
    type: str = Field(sa_type=Text, primary_key=True)
    value: str = Field(sa_type=Text, primary_key=True)


class NodeRow(Row, table=True):
    """An attested node."""

    __tablename__ = "nodes"
    __table_args__ = (
        CheckConstraint("banned OR ban_reason = ''", name="ban_reason"),
        Index("ix_nodes_expires_at", "expires_at"),
    )

    spiffe_id: str = Field(sa_type=Text, primary_key=True)
    attestor: str = Field(sa_type=Text, nullable=False)
    selectors: str = Field(sa_type=Text, nullable=False)
    attested_at: int = Field(sa_type=BigInteger, nullable=False)
    serial: str = Field(sa_type=Text, nullable=False)
    expires_at: int = Field(sa_type=BigInteger, nullable=False)
    reattestable: bool = Field(nullable=False)
    banned: bool = Field(nullable=False)
    ban_reason: str = Field(sa_type=Text, nullable=False)


class JoinTokenRow(Row, table=True):
    """A join token's SHA-256, never the token."""

    __tablename__ = "join_tokens"
    __table_args__ = (
        CheckConstraint("length(token_hash) = 64", name="token_hash"),
        CheckConstraint("expires_at > created_at", name="times"),
        CheckConstraint("used_at IS NULL OR used_at < expires_at", name="used_at"),
        Index("ix_join_tokens_expires_at", "expires_at"),
    )

    token_hash: str = Field(sa_type=Text, primary_key=True)
    node_id: str = Field(sa_type=Text, nullable=False)
    expires_at: int = Field(sa_type=BigInteger, nullable=False)
    created_at: int = Field(sa_type=BigInteger, nullable=False)
    used_at: int | None = Field(sa_type=BigInteger, nullable=True)


class CredentialRow(Row, table=True):
    """The ledger: one row for every credential the broker set out to issue.

    `singled_out` says that it was revoked by its own id, not with an identity or a node;
    `order_id` by which order, empty when by none.
    """

    __tablename__ = "credentials"
    __table_args__ = (
        UniqueConstraint("id", name="uq_credentials_id"),
        Index("ix_credentials_spiffe_id", "spiffe_id", "seq"),
        Index(
            "ix_credentials_entry_id",
            "entry_id",
            "seq",
            sqlite_where=text("entry_id <> ''"),
            postgresql_where=text("entry_id <> ''"),
        ),
        Index(
            "ix_credentials_node_id",
            "node_id",
            "seq",
            sqlite_where=text("node_id IS NOT NULL"),
            postgresql_where=text("node_id IS NOT NULL"),
        ),
        Index(
            "ix_credentials_unanswered",
            "recorded_at",
            sqlite_where=text(UNANSWERED),
            postgresql_where=text(UNANSWERED),
        ),
        Index(
            "ix_credentials_expirable",
            "not_after",
            sqlite_where=text(EXPIRABLE),
            postgresql_where=text(EXPIRABLE),
        ),
        Index(
            "ix_credentials_dead",
            "not_after",
            sqlite_where=text(DEAD),
            postgresql_where=text(DEAD),
        ),
        # Nothing that is issued is in it: only what an order has revoked.
        Index(
            "ix_credentials_order_id",
            "order_id",
            "seq",
            sqlite_where=text(ORDERED),
            postgresql_where=text(ORDERED),
        ),
        CheckConstraint("length(id) > 0", name="id"),
        CheckConstraint(one_of("kind", CredentialKind), name="kind"),
        CheckConstraint(one_of("state", CredentialState), name="state"),
        CheckConstraint("not_after > not_before", name="validity"),
        CheckConstraint("state <> 'issued' OR digest <> ''", name="issued"),
        CheckConstraint(
            "(state = 'revoked') = (revoked_at IS NOT NULL)"
            " AND (state = 'revoked') = (reason IS NOT NULL)",
            name="revoked",
        ),
        # All of RFC 5280, section 5.3.1, not only what is used: SQLite cannot change it later.
        CheckConstraint("reason IS NULL OR reason BETWEEN 0 AND 10", name="reason"),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(default=None, sa_type=Number, primary_key=True)
    id: str = Field(sa_type=Text, nullable=False)
    kind: str = Field(sa_type=Text, nullable=False)
    state: str = Field(sa_type=Text, nullable=False)
    spiffe_id: str = Field(sa_type=Text, nullable=False)
    entry_id: str = Field(sa_type=Text, nullable=False)
    entry_revision: int = Field(sa_type=BigInteger, nullable=False)
    node_id: str | None = Field(sa_type=Text, nullable=True)
    authority_id: str = Field(sa_type=Text, nullable=False)
    key_fingerprint: str = Field(sa_type=Text, nullable=False)
    tbs_digest: str = Field(sa_type=Text, nullable=False)
    not_before: int = Field(sa_type=BigInteger, nullable=False)
    not_after: int = Field(sa_type=BigInteger, nullable=False)
    recorded_at: int = Field(sa_type=BigInteger, nullable=False)
    correlation_id: str = Field(sa_type=Text, nullable=False)
    digest: str = Field(sa_type=Text, nullable=False)
    revoked_at: int | None = Field(sa_type=BigInteger, nullable=True)
    reason: int | None = Field(sa_type=Integer, nullable=True)
    comment: str = Field(sa_type=Text, nullable=False)
    instance: str = Field(
        default="", sa_type=Text, nullable=False, sa_column_kwargs={"server_default": text("''")}
    )
    singled_out: bool = Field(
        default=False, nullable=False, sa_column_kwargs={"server_default": false()}
    )
    order_id: str = Field(
        default="", sa_type=Text, nullable=False, sa_column_kwargs={"server_default": text("''")}
    )


class AuthorityRow(Row, table=True):
    """A signing authority; its private key is elsewhere. `position` keeps the order of a kind."""

    __tablename__ = "authorities"
    __table_args__ = (
        Index(
            "uq_authorities_active",
            "kind",
            unique=True,
            sqlite_where=text("state = 'active'"),
            postgresql_where=text("state = 'active'"),
        ),
        Index(
            "uq_authorities_prepared",
            "kind",
            unique=True,
            sqlite_where=text("state = 'prepared'"),
            postgresql_where=text("state = 'prepared'"),
        ),
        UniqueConstraint("kind", "position", name="uq_authorities_position"),
        CheckConstraint(one_of("kind", AuthorityKind), name="kind"),
        CheckConstraint(one_of("state", AuthorityState), name="state"),
        CheckConstraint("not_after > not_before", name="validity"),
    )

    id: str = Field(sa_type=Text, primary_key=True)
    kind: str = Field(sa_type=Text, nullable=False)
    position: int = Field(sa_type=Integer, nullable=False)
    state: str = Field(sa_type=Text, nullable=False)
    key_id: str = Field(sa_type=Text, nullable=False)
    algorithm: str = Field(sa_type=Text, nullable=False)
    public_key_der: bytes = Field(sa_type=LargeBinary, nullable=False)
    chain: str = Field(sa_type=Text, nullable=False)
    roots: str = Field(sa_type=Text, nullable=False)
    upstream: str = Field(sa_type=Text, nullable=False)
    created_at: int = Field(sa_type=BigInteger, nullable=False)
    not_before: int = Field(sa_type=BigInteger, nullable=False)
    not_after: int = Field(sa_type=BigInteger, nullable=False)


class AuthoritySetRow(Row, table=True):
    """How often the authorities of a kind changed: what the bundle's sequence is made of."""

    __tablename__ = "authority_sets"
    __table_args__ = (
        CheckConstraint(one_of("kind", AuthorityKind), name="kind"),
        CheckConstraint("version >= 1", name="version"),
    )

    kind: str = Field(sa_type=Text, primary_key=True)
    version: int = Field(sa_type=BigInteger, nullable=False)


class AuditRow(Row, table=True):
    """One line of the audit log. Triggers refuse UPDATE and DELETE."""

    __tablename__ = "audit_events"
    __table_args__ = (
        # Not the list of kinds: it grows with every release, and SQLite would have to copy the
        # whole log to change it. `AuditRepository` takes nothing but an AuditKind.
        CheckConstraint("kind <> ''", name="kind"),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(default=None, sa_type=Number, primary_key=True)
    at: int = Field(sa_type=BigInteger, nullable=False)
    kind: str = Field(sa_type=Text, nullable=False)
    actor: str = Field(sa_type=Text, nullable=False)
    subject: str = Field(sa_type=Text, nullable=False)
    reason: str = Field(sa_type=Text, nullable=False)
    correlation_id: str = Field(sa_type=Text, nullable=False)
    facts: str = Field(sa_type=Text, nullable=False)


class OutboxRow(Row, table=True):
    """One change, in commit order."""

    __tablename__ = "outbox"
    __table_args__ = (
        # Not the list of topics: it grows, as the audit's kinds do.
        CheckConstraint("topic <> ''", name="topic"),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(default=None, sa_type=Number, primary_key=True)
    topic: str = Field(sa_type=Text, nullable=False)
    key: str = Field(sa_type=Text, nullable=False)


class OutboxMarkRow(Row, table=True):
    """The one row that says up to which number the outbox was purged; 0 for not at all."""

    __tablename__ = "outbox_mark"
    __table_args__ = (
        CheckConstraint("id = 1", name="single"),
        CheckConstraint("purged_to >= 0", name="purged_to"),
    )

    id: int = Field(sa_type=Integer, primary_key=True)
    purged_to: int = Field(sa_type=BigInteger, nullable=False)


def table_of(row: type[Row]) -> Table:
    """The table whose rows these are."""
    return Row.metadata.tables[str(row.__tablename__)]


spiffe_ids = table_of(SpiffeIdRow)
entries = table_of(EntryRow)
entry_selectors = table_of(EntrySelectorRow)
nodes = table_of(NodeRow)
join_tokens = table_of(JoinTokenRow)
credentials = table_of(CredentialRow)
authorities = table_of(AuthorityRow)
authority_sets = table_of(AuthoritySetRow)
audit_events = table_of(AuditRow)
outbox = table_of(OutboxRow)
outbox_mark = table_of(OutboxMarkRow)
