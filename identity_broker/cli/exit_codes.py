"""The exit codes of `idb`, and which failure ends with which.

- One place: no command chooses a number of its own.
- A code says what sort of failure it was; the stable reason on stderr says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from identity_broker.errors import Kind


class ExitCode(IntEnum):
    """What the shell sees."""

    OK = 0
    USAGE = 2
    DENIED = 3
    NOT_FOUND = 4
    CONFLICT = 5
    UNAVAILABLE = 6
    BUG = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141


MEANINGS: Mapping[ExitCode, str] = MappingProxyType(
    {
        ExitCode.OK: "Done.",
        ExitCode.USAGE: "The command, a value, a file or the configuration cannot be used.",
        ExitCode.DENIED: "Refused: the caller may not, or a check came out negative "
        "(`svid verify`, `revoke verify`, `explain`).",
        ExitCode.NOT_FOUND: "The object named does not exist.",
        ExitCode.CONFLICT: "It clashes with what is there: the object exists, changed since it "
        "was read, or another `idb dev` holds the directory.",
        ExitCode.UNAVAILABLE: "The broker or something it needs does not answer, or a limit was "
        "reached; trying again later can help.",
        ExitCode.BUG: "A bug, here or in the broker; quote the id.",
        ExitCode.INTERRUPTED: "Interrupted (Ctrl-C), or a question was answered with no.",
        ExitCode.BROKEN_PIPE: "The reader of stdout went away.",
    }
)

BY_KIND: Mapping[Kind, ExitCode] = MappingProxyType(
    {
        Kind.INVALID: ExitCode.USAGE,
        Kind.CONFIG: ExitCode.USAGE,
        Kind.UNAUTHENTICATED: ExitCode.DENIED,
        Kind.DENIED: ExitCode.DENIED,
        Kind.NOT_FOUND: ExitCode.NOT_FOUND,
        Kind.CONFLICT: ExitCode.CONFLICT,
        Kind.STALE: ExitCode.CONFLICT,
        Kind.EXHAUSTED: ExitCode.UNAVAILABLE,
        Kind.UNAVAILABLE: ExitCode.UNAVAILABLE,
        Kind.DEADLINE: ExitCode.UNAVAILABLE,
        Kind.INTERNAL: ExitCode.BUG,
    }
)

# By class name along the method resolution order, so that nothing has to be imported to ask.
BY_CLIENT_ERROR: Mapping[str, ExitCode] = MappingProxyType(
    {
        "RequestRejected": ExitCode.USAGE,
        "SettingsInvalid": ExitCode.USAGE,
        "NotAuthenticated": ExitCode.DENIED,
        "NotPermitted": ExitCode.DENIED,
        "PeerRejected": ExitCode.DENIED,
        "IdentityRevoked": ExitCode.DENIED,
        "IdentityWithdrawn": ExitCode.DENIED,
        "IdentityExpired": ExitCode.DENIED,
        "ObjectNotFound": ExitCode.NOT_FOUND,
        "Conflict": ExitCode.CONFLICT,
        "LimitReached": ExitCode.UNAVAILABLE,
        "BrokerUnavailable": ExitCode.UNAVAILABLE,
        "SourceError": ExitCode.UNAVAILABLE,
        "BrokerFailed": ExitCode.BUG,
        "ProtocolViolation": ExitCode.BUG,
        "IdentityError": ExitCode.BUG,
    }
)
BY_CA_ERROR: Mapping[str, ExitCode] = MappingProxyType(
    {
        "BackendUnavailable": ExitCode.UNAVAILABLE,
        "KeyNotFound": ExitCode.NOT_FOUND,
        "AuthorityTransitionError": ExitCode.CONFLICT,
        "ChainRejected": ExitCode.DENIED,
        "TokenRejected": ExitCode.DENIED,
        "StatementRejected": ExitCode.DENIED,
        "CAError": ExitCode.USAGE,
    }
)
