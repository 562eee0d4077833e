"""Every way the broker refuses or fails, in one tree.

- `reason` is stable, UPPER_SNAKE and part of the API; it travels in google.rpc.ErrorInfo.
- `public` is one sentence the caller may read: no internals, no secrets.
- `detail` and `fields` are for the operator's log alone.
- `hint` is the next action, as a command where there is one.

    BrokerError
    ├── RequestError          MalformedRequest PageTokenInvalid EntryInvalid InvalidSpiffeId
    │                         CsrRejected KeyTooWeak PolicyViolation LintFailed AudienceInvalid
    │                         AttestorUnknown SecurityHeaderMissing TokenInvalid SubjectInvalid
    ├── AuthenticationError   Unauthenticated AttestationFailed JoinTokenRejected ChallengeFailed
    │                         CallerUnknown ProcessChanged
    ├── AuthorizationError    MethodDenied EntryNotAuthorized NodeBanned NodeUnknown
    │                         CredentialRevoked NoIdentity KeyBlocked
    ├── NotFoundError         EntryNotFound NodeNotFound CredentialNotFound AuthorityNotFound
    │                         ServiceNotFound SubjectNotFound RevocationNotFound HoldNotFound
    ├── ConflictError         EntryExists SpiffeIdCaseConflict StaleWrite HoldExists
    │                         RevocationExists
    ├── ExhaustedError        RateLimited WatchLagged
    ├── DependencyError       StoreUnavailable SigningBackendUnavailable AuthorityUnavailable
    │                         AgentNotReady IdentityEpochNow
    ├── BrokerStopping        the broker drains; another one, or this one later, will answer
    ├── DeadlineExceeded      the work was not done in the time the caller or the method table gave
    ├── ConfigError           (never crosses the wire)
    └── InvariantViolated     INTERNAL: a bug; its detail never leaves the process
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar


class Kind(Enum):
    """What sort of failure it is: decides the gRPC status, the CLI's exit code, the log level."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    DENIED = "denied"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    STALE = "stale"
    EXHAUSTED = "exhausted"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    CONFIG = "config"
    INTERNAL = "internal"


class BrokerError(Exception):
    """Root of the tree; raise a leaf.

    Args:
        public: one sentence for the caller; the class's own sentence when omitted.
        detail: for the operator's log only.
        hint: the next action; the class's own hint when omitted.
        retry_after: seconds to wait before a retry could help, or None.
        fields: structured facts for the log.
    """

    kind: ClassVar[Kind] = Kind.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    sentence: ClassVar[str] = "the broker failed; this is a bug"
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        public: str = "",
        *,
        detail: str = "",
        hint: str = "",
        retry_after: float | None = None,
        **fields: Any,
    ) -> None:
        self.public = public or self.sentence
        self.detail = detail
        self.hint = hint or self.default_hint
        self.retry_after = retry_after
        self.fields = fields
        super().__init__(self.public if not detail else f"{self.public} ({detail})")


# --- the request itself is wrong ---------------------------------------------------------------


class RequestError(BrokerError):
    """The request can never succeed as it stands."""

    kind = Kind.INVALID


class MalformedRequest(RequestError):
    """A required field is missing, or a value is outside its range."""

    reason = "MALFORMED_REQUEST"
    sentence = "the request is malformed"


class PageTokenInvalid(RequestError):
    """A page token that this broker did not hand out, or for another method or filter."""

    reason = "PAGE_TOKEN_INVALID"
    sentence = "the page token is not one this broker handed out for this request"
    default_hint = "start over without a page token"


class EntryInvalid(RequestError):
    """A registration entry that contradicts itself or the trust domain."""

    reason = "ENTRY_INVALID"
    sentence = "the registration entry is invalid"


class InvalidSpiffeId(RequestError):
    """Not a SPIFFE ID, or one this broker may not use."""

    reason = "SPIFFE_ID_INVALID"
    sentence = "that is not a valid SPIFFE ID"
    default_hint = 'a SPIFFE ID looks like "spiffe://example.org/payments/api"'


class CsrRejected(RequestError):
    """A certificate signing request that does not parse or prove possession of its key."""

    reason = "CSR_REJECTED"
    sentence = "the certificate signing request was rejected"


class KeyTooWeak(RequestError):
    """A public key outside the profile."""

    reason = "KEY_TOO_WEAK"
    sentence = "the key is too weak or of a kind the profile does not allow"
    default_hint = "use an EC P-256 key"


class PolicyViolation(RequestError):
    """A credential the profile does not allow."""

    reason = "POLICY_VIOLATION"
    sentence = "the credential asked for is outside its profile"


class LintFailed(RequestError):
    """The to-be-signed certificate did not pass the linter."""

    reason = "LINT_FAILED"
    sentence = "the certificate to be signed does not follow its profile"


class AudienceInvalid(RequestError):
    """A JWT-SVID asked for without an audience, or with an impossible one."""

    reason = "AUDIENCE_INVALID"
    sentence = "a JWT-SVID needs between 1 and 32 audiences of 1 to 512 bytes"


class AttestorUnknown(RequestError):
    """A node attestor that is not configured here."""

    reason = "ATTESTOR_UNKNOWN"
    sentence = "that node attestor is not enabled on this broker"
    default_hint = "idb config show lists the node attestors that are enabled"


class SecurityHeaderMissing(RequestError):
    """A Workload API call without the header that no browser can be made to send (EP-3)."""

    reason = "SECURITY_HEADER_MISSING"
    sentence = "the Workload API needs the metadata workload.spiffe.io: true"
    default_hint = "use a SPIFFE client library, or add the header"


class TokenInvalid(RequestError):
    """A JWT-SVID that the agent was asked to validate and that does not hold."""

    reason = "TOKEN_INVALID"
    sentence = "the JWT-SVID does not hold"


class SubjectInvalid(RequestError):
    """What to revoke or hold cannot be understood."""

    reason = "SUBJECT_INVALID"
    sentence = "what to revoke is not named in a way that can be understood"
    default_hint = "idb revoke --help"


# --- the caller is not who it must be ----------------------------------------------------------


class AuthenticationError(BrokerError):
    """The caller did not prove who it is."""

    kind = Kind.UNAUTHENTICATED


class Unauthenticated(AuthenticationError):
    """No usable client certificate, or one that has expired."""

    reason = "UNAUTHENTICATED"
    sentence = "this call needs a valid X.509-SVID of the trust domain"


class AttestationFailed(AuthenticationError):
    """The node could not prove what it claims to be."""

    reason = "ATTESTATION_FAILED"
    sentence = "the node could not be attested"


class JoinTokenRejected(AuthenticationError):
    """Unknown, used or expired; the caller is not told which."""

    reason = "JOIN_TOKEN_REJECTED"
    sentence = "the join token is unknown, already used or expired"
    default_hint = "make a new one: idb token generate"


class ChallengeFailed(AuthenticationError):
    """The answer to the attestor's challenge does not verify."""

    reason = "CHALLENGE_FAILED"
    sentence = "the answer to the attestation challenge does not verify"


class CallerUnknown(AuthenticationError):
    """The process behind a connection has ended, or cannot be seen from here."""

    reason = "CALLER_UNKNOWN"
    sentence = "the process behind this connection cannot be identified"
    default_hint = (
        "connect again; a process in a PID namespace that the agent cannot see into is refused"
    )


class ProcessChanged(AuthenticationError):
    """The process behind a connection is not what it was when it connected."""

    reason = "PROCESS_CHANGED"
    sentence = "the process behind this connection has changed its program or its user since"
    default_hint = "connect again"


# --- the caller may not do that ----------------------------------------------------------------


class AuthorizationError(BrokerError):
    """The caller is known and is not allowed to do this."""

    kind = Kind.DENIED


class MethodDenied(AuthorizationError):
    """The method's row in the method table does not name this class of caller."""

    reason = "METHOD_DENIED"
    sentence = "this caller may not call this method"


class EntryNotAuthorized(AuthorizationError):
    """No such entry, or not one of this node's: the caller is not told which."""

    reason = "ENTRY_NOT_AUTHORIZED"
    sentence = "this node is not authorized for that entry"
    default_hint = "idb explain ENTRY --node NODE says which rule did not hold"


class NodeBanned(AuthorizationError):
    """An operator banned the node."""

    reason = "NODE_BANNED"
    sentence = "this node is banned"
    default_hint = (
        "idb node show NODE says why; idb hold lift HOLD, or idb node evict NODE, lets it attest "
        "again"
    )


class NodeUnknown(AuthorizationError):
    """The node was evicted or never attested here."""

    reason = "NODE_UNKNOWN"
    sentence = "this node is not attested here"
    default_hint = "attest again: a join token comes from idb token generate"


class CredentialRevoked(AuthorizationError):
    """The SVID the call was made with is revoked."""

    reason = "CREDENTIAL_REVOKED"
    sentence = "the SVID this call was made with is revoked"


class NoIdentity(AuthorizationError):
    """No registration entry matches a process, or none that it asked for."""

    reason = "NO_IDENTITY"
    sentence = "no identity is registered for this process"
    default_hint = "idb explain --pid PID says which selectors it has and which entries miss"


class KeyBlocked(AuthorizationError):
    """The key was reported as compromised and is refused for ever."""

    reason = "KEY_BLOCKED"
    sentence = "this key was compromised and is refused for ever"
    default_hint = "make a new key"


# --- it is not there ---------------------------------------------------------------------------


class NotFoundError(BrokerError):
    """The object named does not exist."""

    kind = Kind.NOT_FOUND


class EntryNotFound(NotFoundError):
    """No registration entry has that id."""

    reason = "ENTRY_NOT_FOUND"
    sentence = "no registration entry has that id"
    default_hint = "idb entry list"


class NodeNotFound(NotFoundError):
    """No node has that SPIFFE ID."""

    reason = "NODE_NOT_FOUND"
    sentence = "no node has that SPIFFE ID"
    default_hint = "idb node list"


class CredentialNotFound(NotFoundError):
    """The ledger has no such credential."""

    reason = "CREDENTIAL_NOT_FOUND"
    sentence = "the ledger has no such credential"
    default_hint = "idb credential list"


class AuthorityNotFound(NotFoundError):
    """No authority has that id."""

    reason = "AUTHORITY_NOT_FOUND"
    sentence = "no authority has that id"
    default_hint = "idb authority list"


class ServiceNotFound(NotFoundError):
    """A health check names a service that is not served here (grpc.health.v1, `Check`)."""

    reason = "SERVICE_NOT_FOUND"
    sentence = "this broker serves no service of that name"
    default_hint = "ask for the empty name: the broker as a whole"


class SubjectNotFound(NotFoundError):
    """Neither the ledger nor the entries, nodes or authorities know what is to be revoked."""

    reason = "SUBJECT_NOT_FOUND"
    sentence = "nothing is known of what is to be revoked"
    default_hint = "idb credential list"


class RevocationNotFound(NotFoundError):
    """No revocation has that id."""

    reason = "REVOCATION_NOT_FOUND"
    sentence = "no revocation has that id"
    default_hint = "idb revoke list"


class HoldNotFound(NotFoundError):
    """No hold has that name."""

    reason = "HOLD_NOT_FOUND"
    sentence = "no hold has that name"
    default_hint = "idb hold list"


# --- it clashes with what is there -------------------------------------------------------------


class ConflictError(BrokerError):
    """The request clashes with what is stored."""

    kind = Kind.CONFLICT


class EntryExists(ConflictError):
    """An entry with the same id, or the same SPIFFE ID, parent and selectors, is stored."""

    reason = "ENTRY_EXISTS"
    sentence = "such a registration entry exists already"
    default_hint = "idb entry show ENTRY shows the stored one; idb entry update changes it"


class SpiffeIdCaseConflict(ConflictError):
    """Two SPIFFE IDs that differ by letter case alone may not both be registered."""

    reason = "SPIFFE_ID_CASE_CONFLICT"
    sentence = "a SPIFFE ID that differs only by letter case is registered already"
    default_hint = "idb entry list --spiffe-id shows it; choose one spelling"


class StaleWrite(ConflictError):
    """The object changed since the caller read it."""

    kind = Kind.STALE
    reason = "STALE_WRITE"
    sentence = "the entry changed since it was read"
    default_hint = "read it again and repeat the change"


class HoldExists(ConflictError):
    """Another hold has that name."""

    reason = "HOLD_EXISTS"
    sentence = "another hold has that name"
    default_hint = "idb hold list"


class RevocationExists(ConflictError):
    """Another revocation has that id, or its hold is over."""

    reason = "REVOCATION_EXISTS"
    sentence = "another revocation has that id"
    default_hint = "idb revoke status ID"


# --- too much of it ----------------------------------------------------------------------------


class ExhaustedError(BrokerError):
    """A limit was reached; `retry_after` says when to come back."""

    kind = Kind.EXHAUSTED


class RateLimited(ExhaustedError):
    """The caller's budget for this method is spent."""

    reason = "RATE_LIMITED"
    sentence = "too many calls of this method by this caller"


class WatchLagged(ExhaustedError):
    """A watcher read too slowly and was let go."""

    reason = "WATCH_LAGGED"
    sentence = "this watcher fell too far behind"
    default_hint = "call again; the stream starts over with the full state"


# --- something the broker needs is away --------------------------------------------------------


class DependencyError(BrokerError):
    """A dependency is away; nothing was issued; a retry may help."""

    kind = Kind.UNAVAILABLE


class StoreUnavailable(DependencyError):
    """The database did not answer."""

    reason = "STORE_UNAVAILABLE"
    sentence = "the broker cannot reach its database"
    default_hint = "idb doctor checks every dependency"


class SigningBackendUnavailable(DependencyError):
    """The key manager did not answer, or is sealed."""

    reason = "SIGNING_BACKEND_UNAVAILABLE"
    sentence = "the broker cannot reach its signing backend"
    default_hint = "idb doctor checks every dependency"


class AuthorityUnavailable(DependencyError):
    """No authority is active."""

    reason = "AUTHORITY_UNAVAILABLE"
    sentence = "the broker has no active signing authority"
    default_hint = "idb authority list shows the authorities; idb doctor says what is missing"


class AgentNotReady(DependencyError):
    """The agent has not heard from its broker yet, or could not obtain what is asked for."""

    reason = "AGENT_NOT_READY"
    sentence = "the agent cannot answer yet"
    default_hint = "idb agent status says what it waits for"


class IdentityEpochNow(DependencyError):
    """All JWT-SVIDs of the identity up to this second were revoked; from the next one on they hold.

    RFC 7519 dates are whole seconds as used here: a token of this second looks like one before.
    """

    reason = "IDENTITY_EPOCH"
    sentence = "tokens of this identity issued in this second are refused"
    default_hint = "call again in a second"


class BrokerStopping(BrokerError):
    """The broker drains, and the call still needed the caller to answer."""

    kind = Kind.UNAVAILABLE
    reason = "BROKER_STOPPING"
    sentence = "the broker is shutting down"
    default_hint = "call again in a moment"


class DeadlineExceeded(BrokerError):
    """The work was not done in the time the caller, or the method's row, allows."""

    kind = Kind.DEADLINE
    reason = "DEADLINE_EXCEEDED"
    sentence = "the broker did not finish in time"
    default_hint = "call again; idb doctor checks every dependency"


# --- the rest ----------------------------------------------------------------------------------


class ConfigError(BrokerError):
    """The configuration cannot be used; lists all problems at once, never a value."""

    kind = Kind.CONFIG
    reason = "CONFIG_INVALID"
    sentence = "the configuration cannot be used"
    default_hint = "idb config check --config FILE lists every problem"


class InvariantViolated(BrokerError):
    """A bug: something that must hold did not."""

    kind = Kind.INTERNAL
    reason = "INTERNAL"
