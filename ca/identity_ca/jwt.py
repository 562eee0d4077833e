"""JWT-SVIDs: made in two steps, and validated (JWT-SVID.md; RFC 7515, 7518, 7519).

- `prepare` fixes every byte that will be signed and its digest; `sign` adds the signature, once.
  What was prepared can be recorded before any key is touched.
- A token never outlives the authority that signs it.
- Only compact serialization exists here, in both directions (J-1).
- Validation looks at the algorithm first (J-4), then at the signature, and only then at what the
  token says. A key verifies with the algorithms of its own kind; the header never brings one.
- Everything that is not accepted is a `TokenRejected`; nothing of the token is echoed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from identity_ca.bundle import TrustBundle
from identity_ca.errors import (
    AudienceInvalid,
    BundleRejected,
    LintFailed,
    ProfileViolation,
    SpiffeIdError,
    TokenRejected,
)
from identity_ca.jose import (
    MalformedJose,
    b64url_decode,
    b64url_encode,
    parse_json_object,
)
from identity_ca.jws import JWS_ALGORITHMS, JwsAlgorithm, jws_signature, signing_algorithm
from identity_ca.keys import SigningKey
from identity_ca.serial import new_jti
from identity_ca.spiffe_id import SpiffeId, TrustDomain

__all__ = [
    "DEFAULT_LEEWAY",
    "MAX_AUDIENCES",
    "MAX_AUDIENCE_BYTES",
    "MAX_JWT_TTL",
    "MAX_TOKEN_BYTES",
    "MIN_AUTHORITY_REMAINING",
    "JwtCredential",
    "JwtIssuer",
    "PreparedJwt",
    "VerifiedJwt",
    "check_audiences",
    "verify_jwt_svid",
]

MAX_TOKEN_BYTES: Final = 16 * 1024
"""Longest token made or read."""

MAX_AUDIENCES: Final = 32
"""Most audiences one token may be for. One is best (JWT-SVID, security considerations)."""

MAX_AUDIENCE_BYTES: Final = 512
"""Longest audience, in UTF-8."""

MAX_JWT_TTL: Final = timedelta(days=1)
"""Longest lifetime that may be asked for."""

MIN_AUTHORITY_REMAINING: Final = timedelta(seconds=60)
"""An authority this close to its end prepares nothing any more."""

DEFAULT_LEEWAY: Final = timedelta(seconds=10)
"""How far clocks may differ (RFC 7519 section 4.1.4)."""

# A signature is the longest part not known when a token is prepared: RSA-4096.
_MAX_SIGNATURE_CHARS: Final = 683
_END_OF_TIME: Final = 253402300800  # 10000-01-01, the first second a datetime cannot hold


# --- issuing --------------------------------------------------------------------------------


class PreparedJwt:
    """A JWT-SVID that only lacks its signature. Made by `JwtIssuer.prepare`, signed once.

    Attributes:
        jti: 40 hex digits.
        spiffe_id: the subject.
        audiences: without repetitions, in the order asked for.
        not_before: the `iat` claim, whole seconds, aware UTC.
        not_after: the `exp` claim, whole seconds, aware UTC.
        signing_input: the bytes to sign (RFC 7515 section 5.1).
        tbs_digest: SHA-256 of `signing_input`, hex.
        authority_id: the `kid` of the key that has to sign it.
    """

    __slots__ = (
        "_ticket",
        "audiences",
        "authority_id",
        "jti",
        "not_after",
        "not_before",
        "signing_input",
        "spiffe_id",
        "tbs_digest",
    )

    def __init__(
        self,
        maker: object,
        *,
        jti: str,
        spiffe_id: SpiffeId,
        audiences: tuple[str, ...],
        not_before: datetime,
        not_after: datetime,
        signing_input: bytes,
        authority_id: str,
    ) -> None:
        if maker is not _MAKER:
            raise TypeError("a PreparedJwt comes from JwtIssuer.prepare")
        self.jti: Final[str] = jti
        self.spiffe_id: Final[SpiffeId] = spiffe_id
        self.audiences: Final[tuple[str, ...]] = audiences
        self.not_before: Final[datetime] = not_before
        self.not_after: Final[datetime] = not_after
        self.signing_input: Final[bytes] = signing_input
        self.tbs_digest: Final[str] = hashlib.sha256(signing_input).hexdigest()
        self.authority_id: Final[str] = authority_id
        # One element, taken by the one signature: list.pop is atomic, so no lock is needed.
        self._ticket: Final = [None]

    def redeem(self, authority_id: str) -> bytes:
        """The bytes to sign, handed out once; for `JwtIssuer.sign` alone.

        Raises:
            ProfileViolation: redeemed before, or by another authority.
            LintFailed: the bytes are not the prepared ones.
        """
        if self.authority_id != authority_id:
            raise ProfileViolation("this JWT-SVID was prepared by another authority")
        if hashlib.sha256(self.signing_input).hexdigest() != self.tbs_digest:
            raise LintFailed("the bytes to be signed are not the ones that were prepared")
        try:
            self._ticket.pop()
        except IndexError:
            raise ProfileViolation(
                "this prepared JWT-SVID was signed already",
                hint="prepare again: a new jti, a new record",
            ) from None
        return self.signing_input

    def __repr__(self) -> str:
        return f"PreparedJwt({self.jti}, {self.spiffe_id})"


_MAKER: Final = object()


@dataclass(frozen=True, slots=True)
class JwtCredential:
    """A signed JWT-SVID. `repr` leaves the token out: whoever has it can use it.

    Attributes:
        token: compact serialization.
        digest: SHA-256 of the token's ASCII bytes, hex.
        jti: as prepared; so are the rest.
    """

    token: str
    digest: str
    jti: str
    spiffe_id: SpiffeId
    not_before: datetime
    not_after: datetime

    def __repr__(self) -> str:
        return f"JwtCredential({self.jti}, {self.spiffe_id}, until {self.not_after.isoformat()})"


class JwtIssuer:
    """Issues JWT-SVIDs of one trust domain with one key. Safe to use from several threads.

    Args:
        authority_id: becomes `kid`.
        trust_domain: the only one whose IDs it signs.
        key: EC P-256 (ES256), EC P-384 (ES384) or RSA (RS256).
        not_after: the authority's end, aware UTC.

    Raises:
        ProfileViolation: an Ed25519 key, for which JWT-SVID has no algorithm (J-3).
    """

    def __init__(
        self,
        *,
        authority_id: str,
        trust_domain: TrustDomain,
        key: SigningKey,
        not_after: datetime,
    ) -> None:
        algorithm = signing_algorithm(key.algorithm)
        self.authority_id: Final[str] = authority_id
        self.trust_domain: Final[TrustDomain] = trust_domain
        self.algorithm: Final[str] = algorithm
        self.not_after: Final[datetime] = not_after
        self._key = key
        # J-2: these three and no other.
        self._header = _encode_json({"alg": algorithm, "kid": authority_id, "typ": "JWT"})

    def prepare(
        self,
        *,
        spiffe_id: SpiffeId,
        audiences: Sequence[str],
        ttl: timedelta,
        now: datetime,
    ) -> PreparedJwt:
        """Fix everything but the signature.

        Lives for `ttl`, or until the authority's own end if that comes first, in whole seconds.

        Raises:
            AudienceInvalid: not 1 to 32 audiences of 1 to 512 bytes, or too long together.
            ProfileViolation: an ID of another trust domain or without a path, a lifetime outside
                one second to one day, or an authority with less than 60 s left.
        """
        if not spiffe_id.member_of(self.trust_domain):
            raise ProfileViolation(f"{self.trust_domain} issues no ID of another trust domain")
        if not spiffe_id.path:
            raise ProfileViolation("a JWT-SVID names a workload, so its ID has a path")
        if not timedelta(seconds=1) <= ttl <= MAX_JWT_TTL:
            raise ProfileViolation(
                f"a JWT-SVID lives for one second to {MAX_JWT_TTL}",
                hint="ask for a shorter time to live",
            )
        if self.not_after - now < MIN_AUTHORITY_REMAINING:
            raise ProfileViolation(
                "the signing authority is about to expire",
                detail=f"{self.authority_id} ends at {self.not_after.isoformat()}",
                hint="idb authority list",
            )
        checked = check_audiences(audiences, spiffe_id)
        issued_at = int(now.timestamp())
        expires_at = min(issued_at + int(ttl.total_seconds()), int(self.not_after.timestamp()))
        jti = new_jti(now)
        claims = {
            "sub": str(spiffe_id),
            "aud": checked,
            "exp": expires_at,
            "iat": issued_at,
            "jti": jti,
        }
        signing_input = f"{self._header}.{_encode_json(claims)}".encode("ascii")
        if len(signing_input) + 1 + _MAX_SIGNATURE_CHARS > MAX_TOKEN_BYTES:
            raise _too_long()
        return PreparedJwt(
            _MAKER,
            jti=jti,
            spiffe_id=spiffe_id,
            audiences=checked,
            not_before=datetime.fromtimestamp(issued_at, UTC),
            not_after=datetime.fromtimestamp(expires_at, UTC),
            signing_input=signing_input,
            authority_id=self.authority_id,
        )

    def sign(self, prepared: PreparedJwt) -> JwtCredential:
        """Sign what was prepared, byte for byte.

        Raises:
            ProfileViolation: signed before, or prepared for another authority.
            BackendUnavailable, BackendMisconfigured, KeyNotFound: a remote key failed; the
                prepared token is spent, because a signature may exist.
        """
        return self.sign_many([prepared])[0]

    def sign_many(self, prepared: Sequence[PreparedJwt]) -> list[JwtCredential]:
        """As `sign`, in one round trip for a remote key; results in the same order."""
        messages = [one.redeem(self.authority_id) for one in prepared]
        signatures = self._key.sign_many(messages)
        return [
            self._credential(one, signature)
            for one, signature in zip(prepared, signatures, strict=True)
        ]

    def _credential(self, prepared: PreparedJwt, signature: bytes) -> JwtCredential:
        raw = jws_signature(signature, self._key.algorithm)
        token = prepared.signing_input + b"." + b64url_encode(raw).encode("ascii")
        return JwtCredential(
            token=token.decode("ascii"),
            digest=hashlib.sha256(token).hexdigest(),
            jti=prepared.jti,
            spiffe_id=prepared.spiffe_id,
            not_before=prepared.not_before,
            not_after=prepared.not_after,
        )


def check_audiences(audiences: Sequence[str], spiffe_id: SpiffeId) -> tuple[str, ...]:
    """The audiences without repetitions, if a token of that identity can be for them.

    Whether a token is too long is known to the byte when it is made; what passes here may still be
    by as much as its header is long.

    Raises:
        AudienceInvalid: not 1 to 32 audiences of 1 to 512 bytes, or too long together.
    """
    if isinstance(audiences, str):
        raise AudienceInvalid("the audiences are a list, not one string")
    if not 1 <= len(audiences) <= MAX_AUDIENCES:
        raise AudienceInvalid(
            f"a JWT-SVID is for 1 to {MAX_AUDIENCES} audiences (J-8)",
            hint="name the service the token is for",
        )
    for audience in audiences:
        try:
            length = len(audience.encode("utf-8"))
        except UnicodeEncodeError as exc:
            raise AudienceInvalid("an audience is not Unicode text") from exc
        if not 1 <= length <= MAX_AUDIENCE_BYTES:
            raise AudienceInvalid(f"an audience is 1 to {MAX_AUDIENCE_BYTES} bytes long")
        if not audience.isprintable():
            raise AudienceInvalid("an audience holds an unprintable character")
    checked = tuple(dict.fromkeys(audiences))
    least = len(_encode_json({"sub": str(spiffe_id), "aud": checked})) + _MAX_SIGNATURE_CHARS
    if least > MAX_TOKEN_BYTES:
        raise _too_long()
    return checked


def _too_long() -> AudienceInvalid:
    return AudienceInvalid(
        f"the audiences make the token longer than {MAX_TOKEN_BYTES} bytes",
        hint="ask for one token per audience",
    )


def _encode_json(members: Mapping[str, Any]) -> str:
    text = json.dumps(members, separators=(",", ":"), ensure_ascii=False)
    return b64url_encode(text.encode("utf-8"))


# --- validating -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerifiedJwt:
    """A JWT-SVID that holds.

    Attributes:
        spiffe_id: the subject.
        audiences: all the token is for, ours among them.
        expires_at: the `exp` claim, aware UTC, without leeway.
        claims: all claims, read-only.
        key_id: which key of the bundle verified it.
    """

    spiffe_id: SpiffeId
    audiences: tuple[str, ...]
    expires_at: datetime
    claims: Mapping[str, Any]
    key_id: str

    @property
    def jti(self) -> str | None:
        """The `jti` claim, if the token has one; uniqueness is not checked (J-13)."""
        value = self.claims.get("jti")
        return value if isinstance(value, str) else None


def verify_jwt_svid(
    token: str,
    *,
    bundle: TrustBundle,
    audience: str | Sequence[str],
    now: datetime,
    leeway: timedelta = DEFAULT_LEEWAY,
) -> VerifiedJwt:
    """Validate a JWT-SVID of the bundle's trust domain for one of our audiences.

    Accepts the nine algorithms of JWT-SVID section 2.1, with or without `kid`. Ignores expired
    keys of the bundle. Does not look at revocation.

    Args:
        token: compact serialization.
        bundle: of the trust domain the subject must belong to.
        audience: what we are called; one of several is enough.
        now: aware UTC.
        leeway: how far the issuer's clock may be off.

    Raises:
        TokenRejected: the token does not hold.
        AudienceInvalid: no audience to check against was given.
    """
    ours = frozenset((audience,) if isinstance(audience, str) else audience)
    if not ours or "" in ours:
        raise AudienceInvalid("a JWT-SVID can only be validated for a known audience (J-8)")
    header_part, claims_part, signature_part = _split(token)
    header = _Header.parse(header_part)
    signature = _decode(signature_part, "signature")
    key_id = _verify_signature(
        header, f"{header_part}.{claims_part}".encode("ascii"), signature, bundle, now - leeway
    )
    return _check_claims(
        _json_object(claims_part, "claims"),
        trust_domain=bundle.trust_domain,
        ours=ours,
        now=now,
        leeway=leeway,
        key_id=key_id,
    )


def _split(token: str) -> tuple[str, str, str]:
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenRejected(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
    if not token.isascii():
        raise TokenRejected("the token is not ASCII text")
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        raise TokenRejected("the token is not a signed JWT in compact serialization (J-1)")
    return parts[0], parts[1], parts[2]


def _decode(part: str, name: str) -> bytes:
    try:
        return b64url_decode(part)
    except MalformedJose as exc:
        raise TokenRejected(f"the token's {name} cannot be read: {exc}") from exc


def _json_object(part: str, name: str) -> dict[str, Any]:
    try:
        return parse_json_object(_decode(part, name))
    except MalformedJose as exc:
        raise TokenRejected(f"the token's {name} cannot be read: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _Header:
    algorithm: JwsAlgorithm
    key_id: str | None

    @classmethod
    def parse(cls, part: str) -> _Header:
        members = _json_object(part, "header")
        name = members.get("alg")
        algorithm = JWS_ALGORITHMS.get(name) if isinstance(name, str) else None
        if algorithm is None:
            raise TokenRejected("the token's algorithm is not one of JWT-SVID's nine (J-4)")
        # Section 2 forbids every other header. That covers the ones that would bring their own key
        # (jwk, jku, x5c, x5u) and those that change how the rest is read (crit, b64).
        if not members.keys() <= {"alg", "kid", "typ"}:
            raise TokenRejected("the token's header holds more than alg, kid and typ (J-2)")
        if "typ" in members and members["typ"] not in ("JWT", "JOSE"):
            raise TokenRejected('the token\'s type is neither "JWT" nor "JOSE" (J-6)')
        key_id = members.get("kid")
        if "kid" in members and not isinstance(key_id, str):
            raise TokenRejected("the token's key ID is not a string")
        return cls(algorithm, key_id)


def _verify_signature(
    header: _Header, signing_input: bytes, signature: bytes, bundle: TrustBundle, now: datetime
) -> str:
    """The ID of the key that verifies it."""
    candidates = [
        key
        for key in bundle.jwt_keys
        if (header.key_id is None or key.key_id == header.key_id)
        and (key.expires_at is None or key.expires_at > now)
    ]
    if not candidates:
        raise TokenRejected(
            "no key of the trust domain's bundle is the one the token was signed with"
        )
    for key in candidates:
        try:
            if header.algorithm.verifies(key.public_key, signature, signing_input):
                return key.key_id
        except BundleRejected:
            # A key we cannot read verifies nothing; another one may.
            continue
    raise TokenRejected("the token's signature does not hold")


def _check_claims(
    claims: dict[str, Any],
    *,
    trust_domain: TrustDomain,
    ours: frozenset[str],
    now: datetime,
    leeway: timedelta,
    key_id: str,
) -> VerifiedJwt:
    expires_at = _numeric_date(claims, "exp")
    if expires_at is None:
        raise TokenRejected("the token has no expiry (J-9)")
    if now - leeway >= expires_at:
        raise TokenRejected("the token has expired (J-9)")
    not_before = _numeric_date(claims, "nbf")
    if not_before is not None and now + leeway < not_before:
        raise TokenRejected("the token is not valid yet (J-10)")
    _numeric_date(claims, "iat")
    audiences = _audiences(claims)
    if ours.isdisjoint(audiences):
        raise TokenRejected("the token is for another audience (J-8)")
    return VerifiedJwt(
        spiffe_id=_subject(claims, trust_domain),
        audiences=audiences,
        expires_at=expires_at,
        claims=MappingProxyType(claims),
        key_id=key_id,
    )


def _subject(claims: Mapping[str, Any], trust_domain: TrustDomain) -> SpiffeId:
    subject = claims.get("sub")
    if not isinstance(subject, str):
        raise TokenRejected("the token has no subject (J-7)")
    try:
        spiffe_id = SpiffeId.parse(subject)
    except SpiffeIdError as exc:
        raise TokenRejected(f"the token's subject is no SPIFFE ID: {exc.message}") from exc
    if not spiffe_id.member_of(trust_domain):
        raise TokenRejected("the token's subject belongs to another trust domain")
    return spiffe_id


def _audiences(claims: Mapping[str, Any]) -> tuple[str, ...]:
    value = claims.get("aud")
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise TokenRejected("the token has no audience (J-8)")
    if not all(isinstance(one, str) for one in values):
        raise TokenRejected("the token's audience is not a list of strings (J-8)")
    return tuple(values)


def _numeric_date(claims: Mapping[str, Any], name: str) -> datetime | None:
    """A NumericDate (RFC 7519 section 2), or None where the claim is missing."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenRejected(f"the token's {name} is not a number")
    if not 0 <= value < _END_OF_TIME:
        raise TokenRejected(f"the token's {name} is out of range")
    return datetime.fromtimestamp(value, UTC)
