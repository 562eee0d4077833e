"""Every error the SDK raises, in one tree.

- `reason` is stable, UPPER_SNAKE and part of the API; a broker's own reason travels unchanged
  (google.rpc.ErrorInfo, domain "identity-broker").
- `message` is one sentence for a person and never holds a secret; `hint` is the next action, as a
  command where there is one.
- `retry_after` is in seconds and only set where a retry of the same call could help.
- `correlation_id` finds the call in the broker's log; empty when the broker never saw the call.

    IdentityError
    ├── RequestRejected       the request can never succeed as it stands
    ├── NotAuthenticated      the broker does not accept who we are: JOIN_TOKEN_REJECTED, …
    ├── NotPermitted          we are known and may not: ENTRY_NOT_AUTHORIZED, METHOD_DENIED, …
    ├── ObjectNotFound        ENTRY_NOT_FOUND, NODE_NOT_FOUND, …
    ├── Conflict              ENTRY_EXISTS, SPIFFE_ID_CASE_CONFLICT
    │   └── StaleObject       STALE_WRITE: changed since it was read
    ├── LimitReached          RATE_LIMITED, WATCH_LAGGED
    ├── BrokerUnavailable     nobody answers, too late, or one of the broker's dependencies is away
    ├── BrokerFailed          INTERNAL: a bug in the broker; quote the correlation id
    ├── ProtocolViolation     the broker answered something that cannot be used
    ├── SettingsInvalid       an argument, environment variable or file of ours cannot be used
    ├── PeerRejected          the other end of a TLS connection is not whom we accept
    │   ├── PeerRevoked       … its certificate is revoked
    │   ├── RevocationsStale  … nobody can say: too long without news of revocations
    │   └── PeerExpired       … its certificate has expired on the open connection
    └── SourceError           this process has no identity to hand out
        ├── IdentityNotReady  … not yet
        ├── IdentityRevoked   … not any more: it was revoked
        ├── IdentityWithdrawn … not any more: this process is not entitled to it
        ├── IdentityExpired   … it expired before it could be renewed
        └── SourceClosed      … the source was closed
"""

from __future__ import annotations

from typing import ClassVar, Self

__all__ = [
    "BrokerFailed",
    "BrokerUnavailable",
    "Conflict",
    "IdentityError",
    "IdentityExpired",
    "IdentityNotReady",
    "IdentityRevoked",
    "IdentityWithdrawn",
    "LimitReached",
    "NotAuthenticated",
    "NotPermitted",
    "ObjectNotFound",
    "PeerExpired",
    "PeerRejected",
    "PeerRevoked",
    "ProtocolViolation",
    "RequestRejected",
    "RevocationsStale",
    "SettingsInvalid",
    "SourceClosed",
    "SourceError",
    "StaleObject",
]


class IdentityError(Exception):
    """Root of the tree; what is raised is always a leaf.

    Args:
        message: one sentence; the class's own when empty.
        reason: the stable reason; the class's own when empty.
        hint: the next action; the class's own when empty.
        retry_after: seconds to wait before a retry could help, or None.
        correlation_id: names the call in the broker's log.
    """

    default_reason: ClassVar[str] = "INTERNAL"
    sentence: ClassVar[str] = "the identity could not be obtained"
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        message: str = "",
        *,
        reason: str = "",
        hint: str = "",
        retry_after: float | None = None,
        correlation_id: str = "",
    ) -> None:
        self.message = message or self.sentence
        self.reason = reason or self.default_reason
        self.hint = hint or self.default_hint
        self.retry_after = retry_after
        self.correlation_id = correlation_id
        super().__init__(self.message)

    def __str__(self) -> str:
        text = f"{self.message} [{self.reason}]"
        if self.hint:
            text = f"{text}; {self.hint}"
        return text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, reason={self.reason!r})"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross processes.
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without anybody changing anything."""
        return self.retry_after is not None or isinstance(self, (BrokerUnavailable, LimitReached))

    @classmethod
    def because(cls, cause: IdentityError) -> Self:
        """The same facts as `cause`, as an error of this class."""
        return cls(
            cause.message,
            reason=cause.reason,
            hint=cause.hint,
            retry_after=cause.retry_after,
            correlation_id=cause.correlation_id,
        )


def _rebuild(
    cls: type[IdentityError], message: str, attributes: dict[str, object]
) -> IdentityError:
    error = cls(message)
    error.__dict__.update(attributes)
    return error


# --- what the broker said -------------------------------------------------------------------------


class RequestRejected(IdentityError):
    """The request can never succeed as it stands (INVALID_ARGUMENT, FAILED_PRECONDITION)."""

    default_reason = "MALFORMED_REQUEST"
    sentence = "the broker rejected the request"


class NotAuthenticated(IdentityError):
    """The broker does not accept who we are (UNAUTHENTICATED)."""

    default_reason = "UNAUTHENTICATED"
    sentence = "the broker does not accept this caller's proof of identity"


class NotPermitted(IdentityError):
    """We are known and may not do this (PERMISSION_DENIED)."""

    default_reason = "METHOD_DENIED"
    sentence = "the broker does not allow this"


class ObjectNotFound(IdentityError):
    """The object named does not exist (NOT_FOUND)."""

    default_reason = "NOT_FOUND"
    sentence = "no such object"


class Conflict(IdentityError):
    """The request clashes with what is stored (ALREADY_EXISTS)."""

    default_reason = "CONFLICT"
    sentence = "the request clashes with what is stored"


class StaleObject(Conflict):
    """The object changed since it was read (ABORTED)."""

    default_reason = "STALE_WRITE"
    sentence = "the object changed since it was read"
    default_hint = "read it again and repeat the change"


class LimitReached(IdentityError):
    """A limit was reached; `retry_after` says when to come back (RESOURCE_EXHAUSTED)."""

    default_reason = "RATE_LIMITED"
    sentence = "a limit of the broker was reached"


class BrokerUnavailable(IdentityError):
    """Nobody answers, it took too long, or a dependency of the broker is away."""

    default_reason = "BROKER_UNREACHABLE"
    sentence = "the broker does not answer"
    default_hint = "is it running, and is this its address? idb doctor checks every dependency"


class BrokerFailed(IdentityError):
    """A bug in the broker; its log has the details under the correlation id."""

    default_reason = "INTERNAL"
    sentence = "the broker failed; this is a bug"


class ProtocolViolation(IdentityError):
    """The broker answered something that cannot be used; nothing of it was kept."""

    default_reason = "PROTOCOL_VIOLATION"
    sentence = "the broker's answer cannot be used"


# --- what we were given ---------------------------------------------------------------------------


class SettingsInvalid(IdentityError):
    """An argument, environment variable or file cannot be used; its value is never shown."""

    default_reason = "SETTINGS_INVALID"
    sentence = "the settings cannot be used"


# --- who is at the other end ----------------------------------------------------------------------


class PeerRejected(IdentityError):
    """The peer's certificate does not verify, or its SPIFFE ID is not one we accept."""

    default_reason = "PEER_REJECTED"
    sentence = "the peer is not one that is accepted here"


class PeerRevoked(PeerRejected):
    """The peer's certificate, or its SPIFFE ID as a whole, is revoked."""

    default_reason = "PEER_REVOKED"
    sentence = "the peer's certificate is revoked"


class RevocationsStale(PeerRejected):
    """Nothing was heard about revocations for longer than our staleness policy allows."""

    default_reason = "REVOCATIONS_STALE"
    sentence = "nothing was heard about revocations for too long"
    default_hint = "source.status() says since when; does the broker or node agent answer?"


class PeerExpired(PeerRejected):
    """The peer's certificate expired while the connection stayed open."""

    default_reason = "PEER_EXPIRED"
    sentence = "the peer's certificate has expired"
    default_hint = "the peer must connect again with its renewed certificate"


# --- what we can hand out -------------------------------------------------------------------------


class SourceError(IdentityError):
    """This process has no identity to hand out."""


class IdentityNotReady(SourceError):
    """No identity has been issued yet; the last failure is in the message when there was one."""

    default_reason = "IDENTITY_NOT_READY"
    sentence = "no identity has been issued to this process yet"
    default_hint = "source.status() says what the source is waiting for"


class IdentityRevoked(SourceError):
    """Our own identity was revoked and no new one could be issued."""

    default_reason = "IDENTITY_REVOKED"
    sentence = "this process's identity is revoked"
    default_hint = "idb credential list --spiffe-id ID says when and why"


class IdentityWithdrawn(SourceError):
    """The Workload API says that this process is not entitled to its identity any more."""

    default_reason = "IDENTITY_WITHDRAWN"
    sentence = "this process may not use its identity any more"
    default_hint = "idb explain --pid PID says which entries this process matches"


class IdentityExpired(SourceError):
    """Our own identity expired before it could be renewed."""

    default_reason = "IDENTITY_EXPIRED"
    sentence = "this process's identity expired before it could be renewed"
    default_hint = "source.status() names the last failure"


class SourceClosed(SourceError):
    """The source was closed."""

    default_reason = "SOURCE_CLOSED"
    sentence = "the identity source is closed"
