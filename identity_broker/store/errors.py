"""The one place where database failures become the broker's.

- A database that is gone, locked, full or too slow is `StoreUnavailable`: try again later.
- A value that cannot be stored is `MalformedRequest`: asking again will not help.
- A constraint that a repository did not foresee is `InvariantViolated`: the constraint held, the
  code above did not.
- Statements and parameters never get into a message: they may hold hashes of secrets.
"""

from __future__ import annotations

from sqlalchemy import exc

from identity_broker.errors import (
    BrokerError,
    InvariantViolated,
    MalformedRequest,
    StoreUnavailable,
)

RETRY_AFTER = 1.0
"""Seconds after which a caller may try again."""

_NO_SUCH_CHARACTER = frozenset({None, "22021"})  # found on this side; by PostgreSQL
_TRANSIENT_STATES = frozenset({"40001", "40P01"})  # serialization failure, deadlock


def translate(error: exc.SQLAlchemyError) -> BrokerError:
    """The broker's error for a failure of SQLAlchemy or of the driver below it."""
    detail = _describe(error)
    if isinstance(error, exc.DataError):
        what = "character" if _state(error) in _NO_SUCH_CHARACTER else "value"
        return MalformedRequest(f"the request holds a {what} that cannot be stored", detail=detail)
    if isinstance(error, exc.IntegrityError):
        return InvariantViolated(detail=detail)
    return StoreUnavailable(detail=detail, retry_after=RETRY_AFTER)


def is_transient(error: exc.SQLAlchemyError) -> bool:
    """Whether the database undid the transaction and asks to run it again."""
    return _state(error) in _TRANSIENT_STATES


def is_disconnect(error: exc.SQLAlchemyError) -> bool:
    """Whether the connection is lost, and with it what was not committed."""
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def _state(error: exc.SQLAlchemyError) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state


def _describe(error: exc.SQLAlchemyError) -> str:
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        lines = str(error.orig).strip().splitlines()
        return f"{type(error.orig).__name__}: {lines[0] if lines else ''}"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
