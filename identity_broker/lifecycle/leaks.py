"""Leaked keys and tokens: whoever has one can end it.

- To have a secret is the proof: a token is presented, a key signs a challenge. Nobody else is asked
  to be trusted, and nobody needs an account.
- Every report that is well-formed is answered alike, whether we know the secret or not: the answer
  tells nobody what is ours.
- Only a key that something live was issued to is blocked: strangers cannot fill our memory with
  keys of their own making.
- Challenges are not stored: they carry their own time and a code of this process, so a broker that
  restarts has the reporter ask again.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from identity_broker.attestors.node import join_token
from identity_broker.domain.caller import Caller, CallerClass
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.revocation import RevocationSubject, SubjectKind
from identity_broker.domain.selection import Selection
from identity_broker.errors import BrokerError, JoinTokenRejected, MalformedRequest, SubjectNotFound
from identity_broker.lifecycle.revoke import OrderRequest, Revoke
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger
from identity_ca.bundle import TrustBundle
from identity_ca.errors import CAError, TokenRejected
from identity_ca.jose import MalformedJose, b64url_decode, b64url_encode, parse_json_object
from identity_ca.jwt import MAX_TOKEN_BYTES, verify_jwt_svid
from identity_ca.keys import key_fingerprint, verify_signature
from identity_ca.spiffe_id import TrustDomain

_log = get_logger("leaks")

CHALLENGE_LIFE: Final = timedelta(minutes=5)
_NONCE_OCTETS: Final = 16
_MOMENT_OCTETS: Final = 8
_CODE_OCTETS: Final = 32
_COMMENT: Final = "reported as leaked by somebody who has it"


def possession_message(trust_domain: TrustDomain, challenge: str) -> bytes:
    """What the leaked key has to sign.

    It begins with words that no other protocol signs, and names the trust domain, so that a
    signature made here is good for nothing else.
    """
    return f"identity-broker leak report\n{trust_domain}\n{challenge}\n".encode()


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a reporter gets.

    Attributes:
        challenge: to be sent back with the report.
        message: what the key has to sign.
        expires_at: when it is good no more.
    """

    challenge: str
    message: bytes
    expires_at: datetime


class Leaks:
    """Takes reports of leaked secrets and revokes what they open.

    Args:
        bundle: the trust domain's bundle, which tells our tokens from others.
    """

    def __init__(
        self,
        *,
        store: Store,
        revoke: Revoke,
        trust_domain: TrustDomain,
        bundle: Callable[[], TrustBundle],
        clock: Clock,
    ) -> None:
        self._store = store
        self._revoke = revoke
        self._trust_domain = trust_domain
        self._bundle = bundle
        self._clock = clock
        self._secret = secrets.token_bytes(_CODE_OCTETS)

    # --- keys -------------------------------------------------------------------------------------

    def challenge(self) -> Challenge:
        """What a key that leaked has to sign."""
        expires_at = self._clock.now() + CHALLENGE_LIFE
        body = secrets.token_bytes(_NONCE_OCTETS) + _moment(expires_at)
        text = b64url_encode(body + self._code(body))
        return Challenge(text, possession_message(self._trust_domain, text), expires_at)

    async def report_key(
        self, public_key: bytes, challenge: str, signature: bytes, reporter: str
    ) -> None:
        """End everything issued to a key, if the reporter has it and we know it.

        Args:
            public_key: SubjectPublicKeyInfo, DER or PEM.
            challenge: from `challenge`, not older than five minutes.
            signature: over the challenge's message, as the key's kind has it: ECDSA (DER) with the
                curve's hash, RSA PKCS#1 v1.5 with SHA-256, or Ed25519.
            reporter: where the report comes from, for the audit log.

        Raises:
            MalformedRequest: the key, the challenge or the signature cannot be accepted.
            StoreUnavailable: repeat the report.
        """
        self._check_challenge(challenge)
        key = _public_key(public_key)
        message = possession_message(self._trust_domain, challenge)
        try:
            verify_signature(key, signature, message)
        except (CAError, InvalidSignature) as exc:
            raise MalformedRequest(
                "the signature does not show that you have the key",
                hint="sign the challenge's message, byte for byte",
            ) from exc
        fingerprint = key_fingerprint(key)
        if await self._is_ours(fingerprint):
            await self._end(SubjectKind.KEY_FINGERPRINT, fingerprint, reporter)
        else:
            _log.info("leak of an unknown key reported", caller=reporter)

    async def _is_ours(self, fingerprint: str) -> bool:
        subject = RevocationSubject(SubjectKind.KEY_FINGERPRINT, fingerprint)
        selection, now = Selection.of(subject), self._clock.now()
        found = await self._store.read(lambda repos: repos.credentials.count(selection, now))
        return found.live_x509 + found.already_revoked > 0

    # --- tokens -----------------------------------------------------------------------------------

    async def report_token(self, token: str, reporter: str) -> None:
        """End a token: a JWT-SVID, or a join token that was not used yet.

        Raises:
            MalformedRequest: it is far too long.
            StoreUnavailable: repeat the report.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise MalformedRequest(f"a token has at most {MAX_TOKEN_BYTES} bytes")
        if token.startswith(join_token.PREFIX):
            await self._spend(token, reporter)
            return
        jti = self._jti(token)
        if jti is None:
            _log.info("leak of an unknown token reported", caller=reporter)
            return
        await self._end(SubjectKind.JTI, jti, reporter)

    def _jti(self, token: str) -> str | None:
        """The token's name in the ledger, if it is one of ours that holds."""
        try:
            claims = parse_json_object(b64url_decode(token.split(".")[1]))
            # For whom it was made does not matter to whoever found it.
            audience = _audiences(claims)
            verified = verify_jwt_svid(
                token, bundle=self._bundle(), audience=audience, now=self._clock.now()
            )
        except (IndexError, MalformedJose, TokenRejected, CAError):
            return None
        return verified.jti

    async def _spend(self, token: str, reporter: str) -> None:
        now = self._clock.now()

        def write(repos: Repositories) -> None:
            try:
                spent = repos.join_tokens.consume(join_token.token_hash(token), now)
            except JoinTokenRejected:
                return  # unknown, used or expired: it opens nothing
            repos.audit.append(self._event(str(spent.node_id), "join token", reporter))

        await self._store.write(write)

    # --- what becomes of it -----------------------------------------------------------------------

    async def _end(self, kind: SubjectKind, value: str, reporter: str) -> None:
        caller = Caller(frozenset({CallerClass.ANYONE}), f"leak report from {reporter}")
        # The same secret reported twice is one revocation.
        digest = hashlib.sha256(f"{kind.value}={value}".encode()).hexdigest()[:16]
        request = OrderRequest(
            id=f"leak-{digest}",
            subject=RevocationSubject(kind, value),
            reason=RevocationReason.KEY_COMPROMISE,
            comment=_COMMENT,
        )
        try:
            await self._revoke.order(request, caller)
        except SubjectNotFound:
            return  # signed by us and unknown to the ledger: it was purged, so it has expired
        except BrokerError as error:
            _log.error("leak not revoked", reason=error.reason, detail=error.detail)
            raise
        await self._store.write(
            lambda repos: repos.audit.append(self._event(value, kind.value, reporter))
        )
        _log.warning("leak reported and revoked", caller=reporter, subject=f"{kind.value}={value}")

    def _event(self, subject: str, kind: str, reporter: str) -> AuditEvent:
        return AuditEvent(
            at=self._clock.now(),
            kind=AuditKind.LEAK_REPORTED,
            actor=reporter,
            subject=subject,
            reason=RevocationReason.KEY_COMPROMISE.name,
            facts={"kind": kind},
        )

    # --- challenges -------------------------------------------------------------------------------

    def _check_challenge(self, text: str) -> None:
        try:
            raw = b64url_decode(text)
        except MalformedJose as exc:
            raise _stale_challenge() from exc
        body, code = raw[:-_CODE_OCTETS], raw[-_CODE_OCTETS:]
        expires = int.from_bytes(body[_NONCE_OCTETS:], "big")
        if (
            len(body) != _NONCE_OCTETS + _MOMENT_OCTETS
            or not hmac.compare_digest(code, self._code(body))
            or self._clock.now().timestamp() * 1000 >= expires
        ):
            raise _stale_challenge()

    def _code(self, body: bytes) -> bytes:
        return hmac.digest(self._secret, body, "sha256")


def _stale_challenge() -> MalformedRequest:
    return MalformedRequest(
        "the challenge is not one of this broker's, or is older than five minutes",
        hint="ask for a new one: POST /leaks/challenge",
    )


def _moment(at: datetime) -> bytes:
    return int(at.timestamp() * 1000).to_bytes(_MOMENT_OCTETS, "big")


def _audiences(claims: dict[str, Any]) -> list[str]:
    found = claims.get("aud")
    if isinstance(found, str):
        return [found]
    if isinstance(found, list):
        return [each for each in found if isinstance(each, str) and each]
    raise MalformedJose("the token has no audience")


def _public_key(encoded: bytes) -> Any:
    load = (
        serialization.load_pem_public_key
        if encoded.lstrip().startswith(b"-----")
        else serialization.load_der_public_key
    )
    try:
        return load(encoded)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise MalformedRequest(
            "the public key cannot be read",
            hint="openssl pkey -in KEY -pubout gives it (SubjectPublicKeyInfo, PEM)",
        ) from exc
