"""From the CA library's refusals to the broker's; nothing else translates them."""

from __future__ import annotations

from identity_broker import errors
from identity_broker.errors import BrokerError, InvariantViolated, SigningBackendUnavailable
from identity_ca.errors import CAError

_BY_REASON: dict[str, type[BrokerError]] = {
    leaf.reason: leaf
    for leaf in (
        errors.InvalidSpiffeId,
        errors.CsrRejected,
        errors.KeyTooWeak,
        errors.PolicyViolation,
        errors.LintFailed,
        errors.AudienceInvalid,
        errors.SigningBackendUnavailable,
    )
}
# A backend that answers wrongly is, to the caller, one that cannot be used now.
_BACKEND_REASONS = frozenset(
    {"SIGNING_BACKEND_MISCONFIGURED", "KEY_NOT_FOUND", "UPSTREAM_REJECTED"}
)


def translate(error: CAError) -> BrokerError:
    """Return the broker's error for one of the CA library's."""
    leaf = _BY_REASON.get(error.reason)
    detail = f"{error}; {error.detail}" if error.detail else str(error)
    if leaf is not None and issubclass(leaf, SigningBackendUnavailable):
        return leaf(detail=detail, retry_after=error.retry_after or 1.0)
    if leaf is not None:
        return leaf(error.message, detail=error.detail, hint=error.hint)
    if error.reason in _BACKEND_REASONS:
        return SigningBackendUnavailable(detail=detail, retry_after=error.retry_after or 5.0)
    return InvariantViolated(detail=detail)
