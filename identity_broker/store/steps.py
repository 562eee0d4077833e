"""How much of a long piece of work one transaction does.

- A ledger's worth of rows changes in steps, a transaction each, so that whoever issues a credential
  waits for a step at most and no statement outgrows its time limit.
- Work is done when a step changed fewer rows than it might have.
"""

from __future__ import annotations

STEP = 1_000
"""Rows one transaction changes at most: some 25 ms of SQLite's one writer."""
