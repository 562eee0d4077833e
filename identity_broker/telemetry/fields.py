"""Every key a log line may have beside its event; a test checks that no other is used.

- Data goes into fields, never into the event: events are constant, so they can be searched for.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

FIELDS: Final = MappingProxyType(
    {
        # every line
        "event": "what happened, a constant",
        "level": "debug, info, warning, error, critical",
        "timestamp": "RFC 3339, UTC",
        "part": "which part of the broker",
        "exception": "traceback of a bug",
        # a call
        "method": "full gRPC method",
        "caller": 'SPIFFE ID, "uid:N" or address',
        "peer": "the other end of the connection",
        "listener": "bootstrap, mtls, local",
        "correlation_id": "one per call; in the caller's error too",
        "reason": 'stable reason of a refusal; "OK"',
        "detail": "what the caller was not told",
        "hint": "the next action",
        "facts": "structured facts of a refusal",
        "duration_ms": "milliseconds",
        "retry_after": "seconds",
        # what it was about
        "spiffe_id": "an identity",
        "node_id": "a node's SPIFFE ID",
        "entry_id": "a registration entry",
        "serial": "serial number or jti",
        "authority_id": "a signing authority",
        "key_id": "a signing key's name",
        "kind": "x509 or jwt",
        "attestor": "a node attestor",
        "selectors": "what an attestor vouched for",
        "not_after": "end of a validity",
        "sequence": "of the bundle or the change feed",
        "count": "how many",
        "state": "where something stands in its life",
        "topic": "of the change feed",
        "names": "of secrets that Envoy asked for, or of verifiers",
        "subject": "what is revoked or held",
        "hold": "its name",
        "check": "what was looked at",
        # the process
        "address": "a bound address",
        "path": "a file or socket",
        "dependency": "store, keys, upstream",
        "job": "a background job",
        "error": "what a library said",
        "error_type": "its class",
        "version": "of the broker",
        "trust_domain": "its name",
        "pid": "a process",
        "uid": "a user",
        "gid": "a group",
        "signal": "received",
        "seconds": "a duration",
        "timeout_s": "seconds something may take",
        "change": "a step in an authority's life",
        "refused": "why something was refused",
        "attempt": "how many times by now",
        "comment": "an operator's words",
        "stream": "stdout or stderr of a child",
    }
)
"""Key → meaning."""
