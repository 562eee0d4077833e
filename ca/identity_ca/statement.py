"""Statements of what was revoked and who has acknowledged it: JWS in flattened JSON (RFC 7515).

- Signed by a JWT authority, whose public key is in the trust bundle: whoever has that bundle
  verifies a statement without asking anybody.
- Can be no JWT-SVID, and a JWT-SVID no statement: another serialization, a `typ` of its own, and
  neither subject nor audience.
- A statement is about the past: a key verifies it for as long as the bundle at hand has the key.
- One spelling: exactly the members named here, strict JSON, strict base64url; nothing unprotected.
- Everything that is not accepted is a `StatementRejected`; nothing of the statement is echoed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from identity_ca.bundle import TrustBundle
from identity_ca.errors import BundleRejected, ProfileViolation, StatementRejected
from identity_ca.jose import MalformedJose, b64url_decode, b64url_encode, parse_json_object
from identity_ca.jws import JWS_ALGORITHMS, jws_signature, signing_algorithm
from identity_ca.keys import SigningKey

__all__ = ["MAX_STATEMENT_BYTES", "STATEMENT_TYPE", "sign_statement", "verify_statement"]

STATEMENT_TYPE: Final = "idb-revocation+json"
"""The `typ` header (RFC 7515 section 4.1.9)."""

MAX_STATEMENT_BYTES: Final = 16 * 1024 * 1024
"""Longest statement made or read: a hundred thousand verifiers by name."""

_MEMBERS: Final = frozenset({"payload", "protected", "signature"})
_HEADERS: Final = frozenset({"alg", "kid", "typ"})
# What makes a JWT somebody's token.
_TOKEN_CLAIMS: Final = frozenset({"sub", "aud"})


def sign_statement(payload: Mapping[str, Any], *, key: SigningKey, key_id: str) -> str:
    """Sign a statement.

    Args:
        payload: what is stated; names the trust domain in `trust_domain`.
        key: of a JWT authority: EC P-256 (ES256), EC P-384 (ES384) or RSA (RS256).
        key_id: becomes `kid`: the authority's id in the bundle.

    Raises:
        ProfileViolation: a key that JOSE has no algorithm for, a payload that could be taken for a
            token, or one that is too long.
        BackendUnavailable, BackendMisconfigured, KeyNotFound: a remote key failed.
    """
    if not _TOKEN_CLAIMS.isdisjoint(payload):
        raise ProfileViolation("a statement has neither a subject nor an audience")
    header = {"alg": signing_algorithm(key.algorithm), "kid": key_id, "typ": STATEMENT_TYPE}
    protected, stated = _encode(header), _encode(payload)
    signature = key.sign(_signing_input(protected, stated))
    text = json.dumps(
        {
            "payload": stated,
            "protected": protected,
            "signature": b64url_encode(jws_signature(signature, key.algorithm)),
        },
        indent=1,
    )
    if len(text) > MAX_STATEMENT_BYTES:
        raise ProfileViolation(f"the statement is longer than {MAX_STATEMENT_BYTES} bytes")
    return text


def verify_statement(text: str, bundle: TrustBundle) -> Mapping[str, Any]:
    """Return what a statement of the bundle's trust domain says, if its signature holds.

    Args:
        text: flattened JSON serialization (RFC 7515 section 7.2.2).

    Raises:
        StatementRejected: it does not hold.
    """
    octets = text.encode("utf-8", "surrogatepass")
    if len(octets) > MAX_STATEMENT_BYTES:
        raise StatementRejected(f"the statement is longer than {MAX_STATEMENT_BYTES} bytes")
    members = _json_object(octets, "text")
    if members.keys() != _MEMBERS or not all(isinstance(one, str) for one in members.values()):
        raise StatementRejected(
            "the statement is not a JWS in flattened JSON serialization",
            hint="it has the members payload, protected and signature, and no other",
        )
    protected, stated = members["protected"], members["payload"]
    _verify_signature(
        _json_object(_decode(protected, "header"), "header"),
        _signing_input(protected, stated),
        _decode(members["signature"], "signature"),
        bundle,
    )
    payload = _json_object(_decode(stated, "payload"), "payload")
    if not _TOKEN_CLAIMS.isdisjoint(payload):
        raise StatementRejected("the statement has a subject or an audience, as tokens do")
    if payload.get("trust_domain") != bundle.trust_domain.name:
        raise StatementRejected("the statement is of another trust domain")
    return MappingProxyType(payload)


def _verify_signature(
    header: Mapping[str, Any], signing_input: bytes, signature: bytes, bundle: TrustBundle
) -> None:
    name = header.get("alg")
    algorithm = JWS_ALGORITHMS.get(name) if isinstance(name, str) else None
    if algorithm is None:
        raise StatementRejected("the statement's algorithm is none that signs statements")
    # Nothing that brings a key of its own (jwk, jku, x5c, x5u) or changes how the rest is read
    # (crit, b64).
    if header.keys() != _HEADERS:
        raise StatementRejected("the statement's header does not hold alg, kid and typ alone")
    if header["typ"] != STATEMENT_TYPE:
        raise StatementRejected(f'the statement\'s type is not "{STATEMENT_TYPE}"')
    key_id = header["kid"]
    key = bundle.jwt_key(key_id) if isinstance(key_id, str) else None
    if key is None:
        raise StatementRejected(
            "no key of the trust domain's bundle is the one the statement was signed with",
            hint="verify it with the bundle of its time",
        )
    try:
        holds = algorithm.verifies(key.public_key, signature, signing_input)
    except BundleRejected as exc:
        raise StatementRejected("the bundle's key for this statement cannot be read") from exc
    if not holds:
        raise StatementRejected("the statement's signature does not hold")


def _signing_input(protected: str, stated: str) -> bytes:
    """RFC 7515 section 5.1.

    Raises:
        StatementRejected: a part is not ASCII.
    """
    try:
        return f"{protected}.{stated}".encode("ascii")
    except UnicodeEncodeError as exc:
        raise StatementRejected("the statement's parts are not base64url") from exc


def _encode(members: Mapping[str, Any]) -> str:
    text = json.dumps(members, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return b64url_encode(text.encode("utf-8"))


def _decode(part: str, name: str) -> bytes:
    try:
        return b64url_decode(part)
    except MalformedJose as exc:
        raise StatementRejected(f"the statement's {name} cannot be read: {exc}") from exc


def _json_object(octets: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_json_object(octets)
    except MalformedJose as exc:
        raise StatementRejected(f"the statement's {name} cannot be read: {exc}") from exc
