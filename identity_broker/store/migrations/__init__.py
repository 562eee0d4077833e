"""Alembic migrations, run by `store.schema`. Additive first: code must run before and after."""
