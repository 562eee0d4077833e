"""Keys in OpenBao's Transit engine: made there, used there, never exported.

- A key id names one version (`transit:idb-x509@3`) and every signature asks for that version: an
  operator's `rotate` cannot change what signs.
- Every signature is verified here with the pinned public key before anybody sees it, and the
  version in its prefix is compared.
- Hash, encoding and RSA padding are always sent: the server's defaults (SHA-256 for every curve,
  PSS for RSA) are wrong for X.509.
- A key that is exportable, may be backed up in plain text, or may be deleted is refused, at each
  `create`, `load` and `check`: the first two can never be switched off again.
- `create` rotates. The new version comes from the reply of the rotation itself, so that neither a
  stale standby nor a second broker can hand two callers the same version.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, assert_never

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from identity_ca.backends.vault.remote_key import (
    RemoteEcKey,
    RemoteEd25519Key,
    RemoteRsaKey,
    digest_of,
)
from identity_ca.backends.vault.session import VaultRefused, VaultSession, data_of
from identity_ca.backends.vault.wire import checked_path
from identity_ca.errors import BackendMisconfigured, BackendUnavailable, KeyNotFound, KeyTooWeak
from identity_ca.keys import KeyAlgorithm, PublicKey, algorithm_of, signature_hash

__all__ = ["TRANSIT_TYPES", "TransitKey", "TransitKeyManager"]

_logger = logging.getLogger(__name__)

TRANSIT_TYPES: Final[Mapping[KeyAlgorithm, str]] = {
    KeyAlgorithm.EC_P256: "ecdsa-p256",
    KeyAlgorithm.EC_P384: "ecdsa-p384",
    KeyAlgorithm.RSA_2048: "rsa-2048",
    KeyAlgorithm.RSA_3072: "rsa-3072",
    KeyAlgorithm.RSA_4096: "rsa-4096",
    KeyAlgorithm.ED25519: "ed25519",
}
"""Transit's name of each algorithm."""

_HASH_NAMES: Final = {"sha256": "sha2-256", "sha384": "sha2-384", "sha512": "sha2-512"}
_KEY_ID: Final = re.compile(
    r"transit:([A-Za-z0-9][A-Za-z0-9._-]{0,127})@([1-9][0-9]{0,8})", re.ASCII
)
_SIGNATURE: Final = re.compile(r"vault:v([0-9]{1,9}):([A-Za-z0-9+/=]+)", re.ASCII)
# OpenBao refuses a request with more than about a thousand JSON strings, two of them an item.
_BATCH: Final = 250
_STALE_READ_SECONDS: Final = 0.6
_STALE_READ_PAUSE: Final = 0.1
_PKCS1V15: Final = padding.PKCS1v15()


class TransitKeyManager:
    """Transit as key manager.

    The keys themselves are set up by an operator (`backends.vault.provision`); this needs to read,
    rotate and sign with them.

    Args:
        session: not closed by `close`; it may be shared with `VaultPkiUpstream`.
        mount: of the Transit engine.
        names: Transit key for each purpose; one key is of one algorithm.
    """

    name: Final = "transit"

    def __init__(
        self,
        session: VaultSession,
        *,
        mount: str = "transit",
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._session = session
        self._mount = mount
        self._names = dict(names or {"x509": "idb-x509", "jwt": "idb-jwt"})
        for name in self._names.values():
            checked_path(f"{mount}/keys/{name}")
            if _KEY_ID.fullmatch(f"transit:{name}@1") is None:
                raise BackendMisconfigured(f'"{name[:100]}" cannot be a Transit key name')

    def create(self, purpose: str, algorithm: KeyAlgorithm) -> TransitKey:
        """A new version of the purpose's key; see `KeyManager.create`.

        Raises:
            BackendUnavailable: no answer.
            BackendMisconfigured: the key is missing, of another type, or not locked down.
        """
        name = self._names.get(purpose)
        if name is None:
            raise BackendMisconfigured(f'no Transit key is configured for purpose "{purpose}"')
        try:
            self._require(name, self._read(name), algorithm)
        except KeyNotFound as exc:
            raise BackendMisconfigured(exc.message, hint=exc.hint, detail=exc.detail) from exc
        found = data_of(self._session.post(f"{self._mount}/keys/{name}/rotate", {}))
        if not found:
            found = self._read(name)  # Vault before 1.13 answers a rotation with 204
        self._require(name, found, algorithm)
        version = int(found["latest_version"])
        _logger.info("transit key rotated", extra={"key": name, "version": version})
        return self._key(name, version, found)

    def load(self, key_id: str) -> TransitKey:
        """The pinned version; see `KeyManager.load`."""
        match = _KEY_ID.fullmatch(key_id)
        if match is None:
            raise KeyNotFound("that is not the id of a Transit key", detail=repr(key_id[:200]))
        name, version = match[1], int(match[2])
        found = self._read_at_least(name, version)
        self._require(name, found, None)
        if int(found.get("min_encryption_version") or 0) > version:
            raise BackendMisconfigured(
                f'Transit key "{name}" may not sign with version {version} any more',
                hint=f"bao write {self._mount}/keys/{name}/config min_encryption_version=0",
            )
        return self._key(name, version, found)

    def check(self) -> None:
        """Every configured key is there, of a usable type and locked down; signs nothing."""
        for name in self._names.values():
            try:
                found = self._read(name)
            except KeyNotFound as exc:
                raise BackendMisconfigured(exc.message, hint=exc.hint, detail=exc.detail) from exc
            self._require(name, found, None)

    def close(self) -> None:
        """Nothing of its own to give back; the session belongs to whoever made it."""

    def _read(self, name: str) -> Mapping[str, Any]:
        try:
            return data_of(self._session.get(f"{self._mount}/keys/{name}"))
        except VaultRefused as exc:
            # A least-privilege policy names the configured keys: what any other name holds is
            # not for us to know, and "denied" means the same as "not there".
            foreign = exc.status == 403 and name not in self._names.values()
            if exc.status != 404 and not foreign:
                raise
            raise KeyNotFound(
                f'there is no Transit key "{name}" for the broker',
                hint="set it up: python -m identity_ca.backends.vault.provision --help",
                detail=exc.detail,
            ) from exc

    def _read_at_least(self, name: str, version: int) -> Mapping[str, Any]:
        """The key once it has that version; a standby may not have heard of it yet."""
        until = time.monotonic() + _STALE_READ_SECONDS
        pause = threading.Event()  # never set
        while True:
            found = self._read(name)
            if int(found.get("latest_version") or 0) >= version or time.monotonic() >= until:
                return found
            pause.wait(_STALE_READ_PAUSE)

    def _require(self, name: str, found: Mapping[str, Any], algorithm: KeyAlgorithm | None) -> None:
        """The key is what a CA key must be.

        Raises:
            BackendMisconfigured: naming everything that is wrong.
        """
        wrong = [
            f"{option} is on"
            for option in ("exportable", "allow_plaintext_backup", "deletion_allowed", "derived")
            if found.get(option) is not False
        ]
        if found.get("soft_deleted"):
            wrong.append("it is deleted")
        if found.get("supports_signing") is not True:
            wrong.append("it cannot sign")
        if int(found.get("auto_rotate_period") or 0) != 0:
            wrong.append("auto_rotate_period is set")
        kind = found.get("type")
        if kind not in TRANSIT_TYPES.values():
            wrong.append(f'its type is "{kind}"')
        elif algorithm is not None and kind != TRANSIT_TYPES[algorithm]:
            wrong.append(f'its type is "{kind}" and not "{TRANSIT_TYPES[algorithm]}"')
        if wrong:
            raise BackendMisconfigured(
                f'Transit key "{name}" cannot be a CA key: {", ".join(wrong)}',
                hint="a key's type and exportability cannot be changed back: provision a key with "
                "another name and configure that",
            )

    def _key(self, name: str, version: int, found: Mapping[str, Any]) -> TransitKey:
        versions = found.get("keys")
        entry = versions.get(str(version)) if isinstance(versions, dict) else None
        if not isinstance(entry, dict):
            raise KeyNotFound(
                f'Transit key "{name}" has no version {version}',
                hint=f"bao read {self._mount}/keys/{name} shows min_available_version and "
                "min_decryption_version",
            )
        return TransitKey(
            self._session,
            mount=self._mount,
            name=name,
            version=version,
            public_key=_public_key(name, str(found.get("type")), str(entry.get("public_key"))),
        )


class TransitKey:
    """One version of one Transit key; a `SigningKey`.

    Made by `TransitKeyManager`. Safe to use from several threads.
    """

    __slots__ = ("_mount", "_name", "_session", "_version", "algorithm", "key_id", "public_key")

    remote: Final = True

    def __init__(
        self,
        session: VaultSession,
        *,
        mount: str,
        name: str,
        version: int,
        public_key: PublicKey,
    ) -> None:
        self._session = session
        self._mount = mount
        self._name = name
        self._version = version
        self.key_id: Final[str] = f"transit:{name}@{version}"
        self.public_key: Final[PublicKey] = public_key
        self.algorithm: Final[KeyAlgorithm] = algorithm_of(public_key)

    def sign(self, message: bytes) -> bytes:
        """See `SigningKey.sign`; one round trip."""
        return self.sign_many([message])[0]

    def sign_many(self, messages: Sequence[bytes]) -> list[bytes]:
        """See `SigningKey.sign_many`; one round trip for each 250."""
        algorithm = signature_hash(self.algorithm)
        inputs = (
            list(messages)
            if algorithm is None
            else [digest_of(message, algorithm) for message in messages]
        )
        return self._sign_inputs(inputs, algorithm)

    def as_private_key(self) -> CertificateIssuerPrivateKeyTypes:
        """See `SigningKey.as_private_key`."""
        public_key = self.public_key
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            return RemoteEcKey(public_key, self._sign_digest)
        if isinstance(public_key, rsa.RSAPublicKey):
            return RemoteRsaKey(public_key, self._sign_digest)
        if isinstance(public_key, ed25519.Ed25519PublicKey):
            return RemoteEd25519Key(public_key, self.sign)
        assert_never(public_key)

    def __repr__(self) -> str:
        return f"TransitKey({self.key_id!r}, {self.algorithm.value})"

    def _sign_digest(self, digest: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
        return self._sign_inputs([digest], algorithm)[0]

    def _sign_inputs(
        self, inputs: Sequence[bytes], algorithm: hashes.HashAlgorithm | None
    ) -> list[bytes]:
        """Signatures over digests (over messages for Ed25519), each one verified."""
        signatures: list[bytes] = []
        for start in range(0, len(inputs), _BATCH):
            part = inputs[start : start + _BATCH]
            for signed, answer in zip(part, self._ask(part, algorithm), strict=True):
                signature = self._unpack(answer)
                self._verify(signature, signed, algorithm)
                signatures.append(signature)
        return signatures

    def _ask(
        self, inputs: Sequence[bytes], algorithm: hashes.HashAlgorithm | None
    ) -> Sequence[Mapping[str, Any]]:
        body: dict[str, Any] = {"key_version": self._version}
        if algorithm is not None:
            name = _HASH_NAMES.get(algorithm.name)
            if name is None:
                raise BackendMisconfigured(f"Transit is not asked to sign {algorithm.name} digests")
            body |= {"prehashed": True, "hash_algorithm": name, "marshaling_algorithm": "asn1"}
        if isinstance(self.public_key, rsa.RSAPublicKey):
            body["signature_algorithm"] = "pkcs1v15"
        encoded = [base64.b64encode(each).decode("ascii") for each in inputs]
        if len(encoded) == 1:
            body["input"] = encoded[0]
        else:
            body["batch_input"] = [{"input": each} for each in encoded]
        try:
            found = data_of(self._session.post(f"{self._mount}/sign/{self._name}", body))
        except VaultRefused as exc:
            raise self._refused(exc) from exc
        answers = [found] if len(encoded) == 1 else found.get("batch_results")
        if not isinstance(answers, list) or len(answers) != len(encoded):
            raise self._integrity("the number of signatures differs from the number of requests")
        return answers

    def _refused(self, exc: VaultRefused) -> Exception:
        said = " ".join(exc.errors)
        gone = "signing key not found" in said or (
            "key version" in said and "minimum encryption" not in said
        )
        if exc.status == 404 or gone:
            return KeyNotFound(
                f'Transit cannot sign with "{self.key_id}": the key or its version is gone',
                hint="prepare and activate a new authority: idb authority list",
                detail=exc.detail,
            )
        return exc

    def _unpack(self, answer: Mapping[str, Any]) -> bytes:
        if answer.get("error"):
            raise BackendUnavailable(
                "Transit refused one signature of a batch", detail=str(answer["error"])[:300]
            )
        match = _SIGNATURE.fullmatch(str(answer.get("signature")))
        if match is None:
            raise self._integrity("the answer holds no signature")
        if int(match[1]) != self._version or answer.get("key_version", self._version) not in (
            self._version,
            str(self._version),
        ):
            raise self._integrity(f"version {self._version} was asked for, {match[1]} signed")
        try:
            return base64.b64decode(match[2], validate=True)
        except binascii.Error as exc:
            raise self._integrity("the signature is not base64") from exc

    def _verify(
        self, signature: bytes, signed: bytes, algorithm: hashes.HashAlgorithm | None
    ) -> None:
        public_key = self.public_key
        try:
            if isinstance(public_key, ed25519.Ed25519PublicKey):
                public_key.verify(signature, signed)
            elif algorithm is None:
                raise InvalidSignature
            elif isinstance(public_key, ec.EllipticCurvePublicKey):
                public_key.verify(signature, signed, ec.ECDSA(Prehashed(algorithm)))
            else:
                public_key.verify(signature, signed, _PKCS1V15, Prehashed(algorithm))
        except InvalidSignature as exc:
            raise self._integrity("a signature does not verify with the pinned key") from exc

    def _integrity(self, why: str) -> BackendMisconfigured:
        return BackendMisconfigured(
            f'Transit answered wrongly for "{self.key_id}": {why}',
            hint="do not use this server until it is understood: check its audit log and version",
        )


def _public_key(name: str, kind: str, text: str) -> PublicKey:
    """Of one version: PEM for EC and RSA, base64 of the 32 raw bytes for Ed25519."""
    try:
        if kind == "ed25519":
            raw = base64.b64decode(text, validate=True)
            return ed25519.Ed25519PublicKey.from_public_bytes(raw)
        public_key = load_pem_public_key(text.encode("ascii"))
        algorithm = algorithm_of(public_key)
    except (ValueError, KeyTooWeak) as exc:
        raise BackendMisconfigured(
            f'the public key of Transit key "{name}" cannot be used', detail=str(exc)[:200]
        ) from exc
    if TRANSIT_TYPES[algorithm] != kind or not isinstance(
        public_key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    ):
        raise BackendMisconfigured(
            f'the public key of Transit key "{name}" is not of its type "{kind}"'
        )
    return public_key
