"""The ledger says which credentials were revoked by their own serial or jti."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this step."""
    # With a default on the server no row is rewritten, however long the ledger is.
    op.add_column(
        "credentials",
        sa.Column("singled_out", sa.Boolean(), server_default=sa.false(), nullable=False),
    )


def downgrade() -> None:
    """Undo this step."""
    op.drop_column("credentials", "singled_out")
