"""The tables of orders, holds, keys, epochs and CRL numbers; what `tables` says holds here too.

- The predicates of partial indexes are shared constants, as there.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Index, Integer, Text, UniqueConstraint, text
from sqlmodel import Field

from identity_broker.domain.revocation import OrderState, SubjectKind
from identity_broker.store.tables import Number, Row, one_of, table_of

UNFINISHED = "state <> 'closed' OR NOT swept"
LASTING = "lifted_at IS NULL"


class RevocationOrderRow(Row, table=True):
    """One decision to revoke."""

    __tablename__ = "revocation_orders"
    __table_args__ = (
        UniqueConstraint("id", name="uq_revocation_orders_id"),
        Index(
            "ix_revocation_orders_unfinished",
            "seq",
            sqlite_where=text(UNFINISHED),
            postgresql_where=text(UNFINISHED),
        ),
        CheckConstraint("length(id) BETWEEN 1 AND 64", name="id"),
        CheckConstraint(one_of("kind", SubjectKind), name="kind"),
        CheckConstraint(one_of("state", OrderState), name="state"),
        CheckConstraint("(state = 'running') = (committed_at IS NULL)", name="committed"),
        CheckConstraint("(state = 'closed') = (statement <> '')", name="closed"),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(default=None, sa_type=Number, primary_key=True)
    id: str = Field(sa_type=Text, nullable=False)
    kind: str = Field(sa_type=Text, nullable=False)
    value: str = Field(sa_type=Text, nullable=False)
    reason: int = Field(sa_type=Integer, nullable=False)
    comment: str = Field(sa_type=Text, nullable=False)
    actor: str = Field(sa_type=Text, nullable=False)
    ordered_at: int = Field(sa_type=BigInteger, nullable=False)
    state: str = Field(sa_type=Text, nullable=False)
    committed_at: int | None = Field(sa_type=BigInteger, nullable=True)
    revoked: int = Field(sa_type=BigInteger, nullable=False)
    already_revoked: int = Field(sa_type=BigInteger, nullable=False)
    expired: int = Field(sa_type=BigInteger, nullable=False)
    released: int = Field(sa_type=BigInteger, nullable=False)
    hold: str = Field(sa_type=Text, nullable=False)
    sequence: int = Field(sa_type=BigInteger, nullable=False)
    swept: bool = Field(nullable=False)
    statement: str = Field(sa_type=Text, nullable=False)


class HoldRow(Row, table=True):
    """A named stop of issuance; the entries it stops name it in `held_by`."""

    __tablename__ = "holds"
    __table_args__ = (
        UniqueConstraint("name", name="uq_holds_name"),
        Index(
            "ix_holds_lasting",
            "seq",
            sqlite_where=text(LASTING),
            postgresql_where=text(LASTING),
        ),
        CheckConstraint("length(name) BETWEEN 1 AND 64", name="name"),
        CheckConstraint(one_of("kind", SubjectKind), name="kind"),
        CheckConstraint("(lifted_at IS NULL) = (lifted_by = '')", name="lifted"),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(default=None, sa_type=Number, primary_key=True)
    name: str = Field(sa_type=Text, nullable=False)
    kind: str = Field(sa_type=Text, nullable=False)
    value: str = Field(sa_type=Text, nullable=False)
    order_id: str = Field(sa_type=Text, nullable=False)
    reason: int = Field(sa_type=Integer, nullable=False)
    actor: str = Field(sa_type=Text, nullable=False)
    created_at: int = Field(sa_type=BigInteger, nullable=False)
    until: int | None = Field(sa_type=BigInteger, nullable=True)
    lifted_at: int | None = Field(sa_type=BigInteger, nullable=True)
    lifted_by: str = Field(sa_type=Text, nullable=False)


class BlockedKeyRow(Row, table=True):
    """A key that is refused for ever. Nothing removes a row."""

    __tablename__ = "blocked_keys"
    __table_args__ = (CheckConstraint("length(fingerprint) = 64", name="fingerprint"),)

    fingerprint: str = Field(sa_type=Text, primary_key=True)
    order_id: str = Field(sa_type=Text, nullable=False)
    reason: int = Field(sa_type=Integer, nullable=False)
    blocked_at: int = Field(sa_type=BigInteger, nullable=False)


class IdentityEpochRow(Row, table=True):
    """Until when the JWT-SVIDs of an identity are refused."""

    __tablename__ = "identity_epochs"
    __table_args__ = (
        Index("ix_identity_epochs_expires_at", "expires_at"),
        CheckConstraint("expires_at >= not_before", name="times"),
    )

    spiffe_id: str = Field(sa_type=Text, primary_key=True)
    not_before: int = Field(sa_type=BigInteger, nullable=False)
    expires_at: int = Field(sa_type=BigInteger, nullable=False)


class CrlNumberRow(Row, table=True):
    """The highest CRL number reserved for an authority: it never goes down."""

    __tablename__ = "crl_numbers"
    __table_args__ = (CheckConstraint("number >= 0", name="number"),)

    authority_id: str = Field(sa_type=Text, primary_key=True)
    number: int = Field(sa_type=BigInteger, nullable=False)


revocation_orders = table_of(RevocationOrderRow)
holds = table_of(HoldRow)
blocked_keys = table_of(BlockedKeyRow)
identity_epochs = table_of(IdentityEpochRow)
crl_numbers = table_of(CrlNumberRow)
