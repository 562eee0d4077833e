"""OpenBao's or Vault's PKI engine as upstream: its CA certifies our signing key.

- The request carries every extension the certificate must have; `use_csr_values` makes the server
  copy them. It adds neither key usage nor name constraints of its own.
- Numbers go as strings: a policy compares them by type, and a JSON number never matches.
- Nothing in the answer is believed: a lifetime cut to the mount's maximum comes with status 200,
  and a certificate may outlive its issuer. The whole is held against what was asked.
- The chain is taken apart by what the certificates are, not by their place in `ca_chain`.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from identity_ca.authority_certificate import build_intermediate_csr
from identity_ca.backends.vault.session import VaultRefused, VaultSession, data_of
from identity_ca.backends.vault.wire import checked_path
from identity_ca.errors import BackendMisconfigured, UpstreamRejected
from identity_ca.keys import SigningKey
from identity_ca.spiffe_id import TrustDomain
from identity_ca.upstream import SignedAuthority, verify_upstream

__all__ = ["VaultPkiUpstream"]

_logger = logging.getLogger(__name__)

_CUT_BY_MORE_THAN: Final = timedelta(seconds=60)
_MAX_CHAIN: Final = 8
_LONGEST_LIST: Final = 8 * 1024 * 1024


class VaultPkiUpstream:
    """A CA in the PKI engine as upstream authority.

    Args:
        session: not closed by `close`; it may be shared with `TransitKeyManager`.
        mount: of the PKI engine.
        issuer_ref: name or id of the issuer that signs us; never `default`, which an operator can
            point elsewhere.
    """

    name: Final = "vault_pki"

    def __init__(
        self, session: VaultSession, *, mount: str = "pki", issuer_ref: str = "idb-root"
    ) -> None:
        if issuer_ref == "default":
            raise BackendMisconfigured(
                'the upstream issuer may not be "default"',
                hint="name the issuer: what is the default can change without notice",
            )
        self._session = session
        self._issuer = checked_path(f"{mount}/issuer/{issuer_ref}")
        self._mount = mount
        self._issuer_ref = issuer_ref

    def certify(
        self, key: SigningKey, *, trust_domain: TrustDomain, ttl: timedelta, now: datetime
    ) -> SignedAuthority:
        """See `UpstreamAuthority.certify`."""
        csr = build_intermediate_csr(key, trust_domain=trust_domain)
        answer = self._session.post(
            f"{self._issuer}/sign-intermediate",
            {
                "csr": csr.public_bytes(Encoding.PEM).decode("ascii"),
                "ttl": f"{int(ttl.total_seconds())}s",
                "use_csr_values": True,
                "max_path_length": "0",
                "format": "pem",
            },
        )
        warnings = answer.get("warnings") or []
        if warnings:
            _logger.info("openbao pki warned", extra={"warnings": [str(w) for w in warnings]})
        found = data_of(answer)
        own = _certificate(found.get("certificate"))
        signed = _assembled(own, [_certificate(pem) for pem in found.get("ca_chain") or []])
        self._refuse_cut_lifetime(own, ttl, now, warnings)
        verify_upstream(signed, key=key, trust_domain=trust_domain, ttl=ttl, now=now)
        return signed

    def revocation_lists(
        self, *, number: int, this_update: datetime, next_update: datetime
    ) -> tuple[bytes, ...]:
        """The issuer's own list, as the server publishes it; anybody may read it.

        Raises:
            UpstreamRejected: the answer holds no list.
            BackendUnavailable, BackendMisconfigured: it cannot be had.
        """
        found = data_of(self._session.get(f"{self._issuer}/crl"))
        pem = found.get("crl")
        if not isinstance(pem, str) or len(pem) > _LONGEST_LIST:
            raise UpstreamRejected("the upstream's answer holds no revocation list")
        try:
            crl = x509.load_pem_x509_crl(pem.encode("ascii"))
        except ValueError as exc:
            raise UpstreamRejected("the upstream's revocation list cannot be parsed") from exc
        return (crl.public_bytes(Encoding.DER),)

    def check(self) -> None:
        """The issuer is there and valid at the server's word; signs nothing."""
        try:
            found = data_of(self._session.get(f"{self._issuer}/json"))
        except VaultRefused as exc:
            raise BackendMisconfigured(
                f'OpenBao\'s PKI mount "{self._mount}" has no issuer "{self._issuer_ref}"',
                hint="set it up: python -m identity_ca.backends.vault.provision --help",
                detail=exc.detail,
            ) from exc
        issuer = _certificate(found.get("certificate"))
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        if constraints.path_length == 0:
            raise BackendMisconfigured(
                f'the issuer "{self._issuer_ref}" may have no CA below it (path length 0)',
                hint="use an issuer whose path length is at least 1 or unlimited",
            )
        if found.get("revoked"):
            raise BackendMisconfigured(f'the issuer "{self._issuer_ref}" is revoked')

    def close(self) -> None:
        """Nothing of its own to give back; the session belongs to whoever made it."""

    def _refuse_cut_lifetime(
        self, own: x509.Certificate, ttl: timedelta, now: datetime, warnings: list[object]
    ) -> None:
        """OpenBao cuts a lifetime to the mount's maximum and answers 200."""
        if own.not_valid_after_utc + _CUT_BY_MORE_THAN >= now + ttl:
            return
        raise UpstreamRejected(
            "OpenBao cut the lifetime of our CA certificate",
            hint=f"bao secrets tune -max-lease-ttl={int(ttl.total_seconds())}s {self._mount}, "
            "or configure a shorter CA lifetime",
            detail=f"asked for {now + ttl:%Y-%m-%dT%H:%MZ}, got "
            f"{own.not_valid_after_utc:%Y-%m-%dT%H:%MZ}; {'; '.join(map(str, warnings))[:300]}",
        )


def _assembled(own: x509.Certificate, others: list[x509.Certificate]) -> SignedAuthority:
    """Our certificate, the intermediates above it in order, and the root they lead to.

    Raises:
        UpstreamRejected: the chain does not lead to a self-signed certificate.
    """
    chain = [own]
    for _ in range(_MAX_CHAIN):
        below = chain[-1]
        above = next((each for each in others if _has_signed(each, below)), None)
        if above is None:
            break
        if _has_signed(above, above):
            return SignedAuthority(chain=tuple(chain), roots=(above,))
        chain.append(above)
    raise UpstreamRejected(
        "the upstream's chain does not lead to a root",
        hint="import the root: bao write PKI_MOUNT/issuers/import/cert pem_bundle=@root.pem",
    )


def _has_signed(above: x509.Certificate, below: x509.Certificate) -> bool:
    try:
        below.verify_directly_issued_by(above)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _certificate(pem: object) -> x509.Certificate:
    if not isinstance(pem, str):
        raise UpstreamRejected("the upstream's answer holds no certificate")
    try:
        return x509.load_pem_x509_certificate(pem.encode("ascii"))
    except ValueError as exc:
        raise UpstreamRejected("the upstream's certificate cannot be parsed") from exc
