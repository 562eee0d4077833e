"""The broker's database: SQLite or PostgreSQL behind one asynchronous facade.

- `Store.read` and `Store.write` run a function over `Repositories` in one transaction.
- `Store.ledger` is the hot path: intents are durable when `intend` returns.
- `Store.changes` tells what changed, in commit order, in this process and in others.
- Rows, SQL and drivers stay in here; domain values go in and come out.
"""

from __future__ import annotations

from identity_broker.store.changes import ChangeFeed
from identity_broker.store.facade import Store
from identity_broker.store.ledger import CommitObserver, Ledger
from identity_broker.store.repositories import Repositories
from identity_broker.store.steps import STEP

__all__ = ["STEP", "ChangeFeed", "CommitObserver", "Ledger", "Repositories", "Store"]
