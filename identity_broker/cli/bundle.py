"""`idb bundle`: what the trust domain verifies with."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import OutputFormat, distance, emit, facts, table
from identity_broker.cli.pem import certificate_pem, public_key_pem
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_ca.bundle import TrustBundle
    from identity_client.admin import Bundle


@click.group(cls=IdbGroup)
def bundle() -> None:
    """Show what the trust domain verifies with."""


@bundle.command(connects=True, examples=["idb bundle show --format pem > bundle.pem"])
@click.option(
    "--format",
    "document_format",
    type=click.Choice(["spiffe", "pem", "jwks"]),
    help="Print the bundle itself: SPIFFE JSON, PEM certificates, or the JWT keys as JWKS.",
)
@pass_invocation
def show(invocation: Invocation, document_format: str | None) -> None:
    """Show the trust domain's bundle. It holds no secret."""
    with Session.open(invocation) as session:
        found = session.admin.bundle()
    if document_format is None:
        emit(invocation.output, _document(found), lambda: _summary(found))
        return
    trusted = to_trust_bundle(found)
    text = {
        "spiffe": trusted.to_spiffe_json,
        "pem": trusted.to_pem,
        "jwks": trusted.to_jwks,
    }[document_format]().decode()
    if document_format == "pem" and invocation.output is OutputFormat.JSON:
        emit(invocation.output, {"bundle_pem": text}, lambda: "")
    else:
        click.echo(text.rstrip("\n"))


def to_trust_bundle(found: Bundle) -> TrustBundle:
    """The bundle as the CA library's type, checked.

    Raises:
        BundleRejected: the broker sent something that is not a bundle.
    """
    from identity_ca.bundle import JwtKey, TrustBundle
    from identity_ca.spiffe_id import TrustDomain

    return TrustBundle(
        trust_domain=TrustDomain.parse(found.trust_domain),
        x509_authorities=found.x509_authorities,
        jwt_keys=tuple(
            JwtKey(key_id=key.key_id, public_key_der=key.public_key, expires_at=key.expires_at)
            for key in found.jwt_keys
        ),
        sequence=found.sequence,
        refresh_hint=found.refresh_hint,
    )


def _summary(found: Bundle) -> str:
    from cryptography import x509

    now = SystemClock().now()
    rows = []
    for der in found.x509_authorities:
        certificate = x509.load_der_x509_certificate(der)
        expires = distance(certificate.not_valid_after_utc, now)
        rows.append(["x509", sha256(der).hexdigest(), expires])
    rows += [["jwt", key.key_id, distance(key.expires_at, now)] for key in found.jwt_keys]
    head = facts(
        [
            ("trust domain", found.trust_domain),
            ("sequence", str(found.sequence)),
            ("refresh hint", f"{int(found.refresh_hint.total_seconds())}s"),
        ]
    )
    body = table(["kind", "sha-256 or key id", "expires"], rows, empty="the bundle is empty")
    return f"{head}\n\n{body}"


def _document(found: Bundle) -> dict[str, Any]:
    return {
        "trust_domain": found.trust_domain,
        "sequence": found.sequence,
        "refresh_hint_seconds": int(found.refresh_hint.total_seconds()),
        "x509_authorities_pem": [certificate_pem(der) for der in found.x509_authorities],
        "jwt_keys": [
            {
                "key_id": key.key_id,
                "public_key_pem": public_key_pem(key.public_key),
                "expires_at": key.expires_at,
            }
            for key in found.jwt_keys
        ],
    }
