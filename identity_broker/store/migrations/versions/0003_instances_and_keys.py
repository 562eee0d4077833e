"""Entries ask for one SVID a process and for a kind of key; the ledger names instances."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this step."""
    # With a default on the server no row is rewritten, however long the ledger is.
    op.add_column(
        "entries",
        sa.Column("per_process", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.add_column(
        "entries",
        sa.Column("key_algorithm", sa.Text(), server_default=sa.text("''"), nullable=False),
    )
    op.add_column(
        "credentials",
        sa.Column("instance", sa.Text(), server_default=sa.text("''"), nullable=False),
    )


def downgrade() -> None:
    """Undo this step."""
    op.drop_column("credentials", "instance")
    op.drop_column("entries", "key_algorithm")
    op.drop_column("entries", "per_process")
