"""Every way the CA library refuses, in one tree.

- `reason` is stable and UPPER_SNAKE; the broker passes it through to its API.
- `message` is one sentence any caller may read: no secrets, no internals, bounded in length.
- `detail` is for the operator's log alone; `hint` is the next action.
- Nothing else leaves the library for bad input: a stray ValueError is a bug.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AnswerRejected",
    "AudienceInvalid",
    "AuthorityTransitionError",
    "BackendMisconfigured",
    "BackendUnavailable",
    "BundleRejected",
    "CAError",
    "ChainRejected",
    "CsrRejected",
    "KeyNotFound",
    "KeyTooWeak",
    "LintFailed",
    "ProfileViolation",
    "SpiffeIdError",
    "StatementRejected",
    "TokenRejected",
    "UpstreamRejected",
]


class CAError(Exception):
    """Root of the tree; raise a leaf.

    Args:
        message: one public sentence.
        hint: what to do about it.
        detail: for the operator's log only.
        retry_after: seconds after which a retry could help, or None when it cannot.
    """

    reason: ClassVar[str] = "CA_ERROR"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        detail: str = "",
        retry_after: float | None = None,
    ) -> None:
        self.message = message
        self.hint = hint
        self.detail = detail
        self.retry_after = retry_after
        super().__init__(message if not detail else f"{message} ({detail})")


class SpiffeIdError(CAError):
    """Not a SPIFFE ID or trust domain name (SPIFFE-ID.md)."""

    reason: ClassVar[str] = "SPIFFE_ID_INVALID"


class CsrRejected(CAError):
    """A signing request that does not parse or does not prove possession of its key."""

    reason: ClassVar[str] = "CSR_REJECTED"


class KeyTooWeak(CAError):
    """A public key that is too weak, or of a kind the profile does not allow."""

    reason: ClassVar[str] = "KEY_TOO_WEAK"


class ProfileViolation(CAError):
    """A certificate the profile, or the issuer's own limits, do not allow."""

    reason: ClassVar[str] = "POLICY_VIOLATION"


class LintFailed(CAError):
    """To-be-signed bytes that break a rule; nothing was signed."""

    reason: ClassVar[str] = "LINT_FAILED"


class AudienceInvalid(CAError):
    """A JWT-SVID asked for without a usable audience."""

    reason: ClassVar[str] = "AUDIENCE_INVALID"


class TokenRejected(CAError):
    """A JWT-SVID that does not validate."""

    reason: ClassVar[str] = "TOKEN_REJECTED"


class StatementRejected(CAError):
    """A revocation's statement that does not hold."""

    reason: ClassVar[str] = "STATEMENT_REJECTED"


class ChainRejected(CAError):
    """An X.509-SVID that does not validate against the bundle."""

    reason: ClassVar[str] = "PEER_REJECTED"


class AnswerRejected(CAError):
    """An OCSP answer that proves nothing about the certificate asked for."""

    reason: ClassVar[str] = "OCSP_ANSWER_REJECTED"


class BundleRejected(CAError):
    """A trust bundle that cannot be read or used."""

    reason: ClassVar[str] = "BUNDLE_REJECTED"


class BackendUnavailable(CAError):
    """The key manager or upstream did not answer; `retry_after` is set."""

    reason: ClassVar[str] = "SIGNING_BACKEND_UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        detail: str = "",
        retry_after: float | None = 1.0,
    ) -> None:
        super().__init__(message, hint=hint, detail=detail, retry_after=retry_after)


class BackendMisconfigured(CAError):
    """The key manager or upstream answers, and its answer cannot be used; a retry is useless."""

    reason: ClassVar[str] = "SIGNING_BACKEND_MISCONFIGURED"


class KeyNotFound(CAError):
    """The key manager holds no key of that id."""

    reason: ClassVar[str] = "KEY_NOT_FOUND"


class AuthorityTransitionError(CAError):
    """An authority cannot go from its state to the one asked for."""

    reason: ClassVar[str] = "AUTHORITY_STATE"


class UpstreamRejected(CAError):
    """The upstream returned a certificate that is not the one asked for."""

    reason: ClassVar[str] = "UPSTREAM_REJECTED"
