"""The one place where database failures become the broker's.

- A database that is gone, locked, full or too slow is `StoreUnavailable`: try again later.
- A constraint that a repository did not foresee is `InvariantViolated`: the constraint held, the
  code above did not.
- Statements and parameters never get into a message: they may hold hashes of secrets.
"""

from __future__ import annotations

from sqlalchemy import exc

from identity_broker.errors import BrokerError, InvariantViolated, StoreUnavailable

RETRY_AFTER = 1.0
"""Seconds after which a caller may try again."""

_TRANSIENT_STATES = frozenset({"40001", "40P01"})  # serialization failure, deadlock


def translate(error: exc.SQLAlchemyError) -> BrokerError:
    """The broker's error for a failure of SQLAlchemy or of the driver below it."""
    detail = _describe(error)
    if isinstance(error, exc.IntegrityError):
        return InvariantViolated(detail=detail)
    return StoreUnavailable(detail=detail, retry_after=RETRY_AFTER)


def is_transient(error: exc.SQLAlchemyError) -> bool:
    """Whether the database undid the transaction and asks to run it again."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in _TRANSIENT_STATES


def is_disconnect(error: exc.SQLAlchemyError) -> bool:
    """Whether the connection is lost, and with it what was not committed."""
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def _describe(error: exc.SQLAlchemyError) -> str:
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        lines = str(error.orig).strip().splitlines()
        return f"{type(error.orig).__name__}: {lines[0] if lines else ''}"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
