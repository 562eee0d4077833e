"""The outbox says how far it was purged; nodes are found by when they expired."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this step."""
    op.create_table(
        "outbox_mark",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("purged_to", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_outbox_mark_single")),
        sa.CheckConstraint("purged_to >= 0", name=op.f("ck_outbox_mark_purged_to")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox_mark")),
    )
    # What an older broker purged is known no better than this. A reader that is sent to start
    # over for nothing has only lost a moment.
    op.execute(
        "INSERT INTO outbox_mark (id, purged_to) SELECT 1, coalesce(min(seq) - 1, 0) FROM outbox"
    )
    op.create_index("ix_nodes_expires_at", "nodes", ["expires_at"], unique=False)


def downgrade() -> None:
    """Undo this step."""
    op.drop_index("ix_nodes_expires_at", table_name="nodes")
    op.drop_table("outbox_mark")
