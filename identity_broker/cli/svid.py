"""`idb svid`: fetch, show and verify SVIDs.

- `fetch` is a node of its own: it makes its key here, and only certificates travel.
- `show` and `verify` work without a broker.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from identity_broker.cli.connect import dev_state
from identity_broker.cli.errors import FileUnusable, UsageRefused
from identity_broker.cli.files import read_input, read_secret, write_public, write_secret
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import distance, emit, say
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_ca.bundle import TrustBundle
    from identity_client.credential import IdentitySnapshot

_FILE = click.Path(path_type=Path)


@click.group(cls=IdbGroup)
def svid() -> None:
    """Fetch, show and verify SVIDs."""


@svid.command(
    connects=True,
    examples=[
        "idb --dir .dev svid fetch --token-file web-1.token --spiffe-id /shop/orders --write svids",
        "idb --dir .dev svid fetch --state-dir web-1.state",
    ],
)
@click.option("--spiffe-id", metavar="ID", help="Who to be (ID or /path); the first one if none.")
@click.option("--token-file", type=_FILE, metavar="FILE", help="Join token in a file; - is stdin.")
@click.option(
    "--token",
    metavar="TOKEN",
    envvar="IDB_JOIN_TOKEN",
    help="Join token. Others can see it in the process list: prefer --token-file.",
)
@click.option(
    "--state-dir",
    type=_FILE,
    metavar="DIR",
    help="Keep the node's key and SVID here, so that the next fetch needs no token.",
)
@click.option(
    "--write",
    type=_FILE,
    metavar="DIR",
    help="Write svid.pem, key.pem (0600) and bundle.pem there.",
)
@click.option("--bootstrap-address", metavar="HOST:PORT", help="With --address.")
@click.option("--trust-domain", metavar="NAME", help="With --address.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=15.0, show_default=True)
@pass_invocation
def fetch(
    invocation: Invocation,
    spiffe_id: str | None,
    token_file: Path | None,
    token: str | None,
    state_dir: Path | None,
    write: Path | None,
    bootstrap_address: str | None,
    trust_domain: str | None,
    timeout: float,
) -> None:
    """Attest this process as a node and fetch an X.509-SVID.

    The broker is that of --dir, or --address with --bootstrap-address, --trust-domain and
    --bundle. The key is made here and leaves only into --write DIR.
    """
    from identity_client.source import IdentitySource

    where = _whereabouts(invocation, bootstrap_address, trust_domain)
    if token_file is not None:
        token = read_secret(token_file)
    if not token and state_dir is None:
        raise UsageRefused(
            "a node needs a join token, or the --state-dir of an earlier fetch",
            hint="idb token generate --write web-1.token",
        )
    if spiffe_id is not None and spiffe_id.startswith("/"):
        spiffe_id = f"spiffe://{where['trust_domain']}{spiffe_id}"
    source = IdentitySource.from_join_token(
        **where,
        # With a state directory that holds a node, the token is not asked for.
        token=token or "idbt_none",
        spiffe_id=spiffe_id,
        state_dir=state_dir,
    )
    with source:
        snapshot = source.wait_ready(timeout)
    _show_fetched(invocation, snapshot, write)


@svid.command(examples=["idb svid show svids/svid.pem"])
@click.argument("file", type=_FILE)
@pass_invocation
def show(invocation: Invocation, file: Path) -> None:
    """Show what an SVID says: certificates (PEM, DER) or a JWT. Nothing is verified."""
    from identity_broker.cli import svid_document

    found = svid_document.read_svid(file)
    now = SystemClock().now()
    if isinstance(found, str):
        token = svid_document.token_document(found, file)
        emit(invocation.output, token, lambda: svid_document.render_token(token, now))
        return
    chain = [svid_document.certificate_document(certificate) for certificate in found]
    emit(
        invocation.output,
        {"certificates": chain},
        lambda: "\n\n".join(svid_document.render_certificate(one, now) for one in chain),
    )


@svid.command(
    examples=[
        "idb svid verify svids/svid.pem --bundle svids/bundle.pem",
        "idb svid verify token.jwt --bundle bundle.json --audience inventory",
    ]
)
@click.argument("file", type=_FILE)
@click.option(
    "--bundle",
    "bundle_file",
    type=_FILE,
    required=True,
    metavar="FILE",
    help="What to verify with: PEM, or SPIFFE JSON (needed for a JWT).",
)
@click.option("--trust-domain", metavar="NAME", help="Whose bundle it is; the SVID's own if none.")
@click.option("--audience", metavar="NAME", help="What we are called; needed for a JWT.")
@pass_invocation
def verify(
    invocation: Invocation,
    file: Path,
    bundle_file: Path,
    trust_domain: str | None,
    audience: str | None,
) -> None:
    """Verify an SVID against a bundle. Exit code 0: it holds; 3: it does not.

    Revocation is not looked at: idb credential show SERIAL tells.
    """
    from identity_broker.cli import svid_document

    found = svid_document.read_svid(file)
    now = SystemClock().now()
    if isinstance(found, str):
        from identity_ca.jwt import verify_jwt_svid

        if not audience:
            raise UsageRefused("a JWT-SVID is verified for an audience", hint="--audience NAME")
        claims = svid_document.token_document(found, file)["claims"]
        bundle = _read_bundle(bundle_file, trust_domain or _domain_of(str(claims.get("sub", ""))))
        token = verify_jwt_svid(found, bundle=bundle, audience=audience, now=now)
        kind, verified_id, name = "jwt", token.jti or "", str(token.spiffe_id)
        expires_at = token.expires_at
    else:
        from cryptography.hazmat.primitives.serialization import Encoding

        from identity_ca.chain import verify_x509_svid

        names = svid_document.certificate_document(found[0])["spiffe_ids"]
        bundle = _read_bundle(bundle_file, trust_domain or _domain_of(names[0] if names else ""))
        chain = [certificate.public_bytes(Encoding.DER) for certificate in found]
        leaf = verify_x509_svid(chain, bundle=bundle, now=now)
        kind, verified_id, name = "x509", leaf.serial, str(leaf.spiffe_id)
        expires_at = leaf.not_after
    document = {
        "verified": True,
        "spiffe_id": name,
        "kind": kind,
        "id": verified_id,
        "expires_at": expires_at,
    }
    say(f"it holds, and expires {distance(expires_at, now)}")
    emit(invocation.output, document, lambda: name)


def _whereabouts(
    invocation: Invocation, bootstrap_address: str | None, trust_domain: str | None
) -> dict[str, Any]:
    if invocation.address is None:
        state = dev_state(invocation)
        return {
            "address": state.broker.address,
            "bootstrap_address": bootstrap_address or state.broker.bootstrap_address,
            "trust_domain": trust_domain or state.trust_domain,
            "bundle_file": invocation.bundle or Path(state.bundle_file),
        }
    needed = {
        "--bootstrap-address": bootstrap_address,
        "--trust-domain": trust_domain,
        "--bundle": invocation.bundle,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise UsageRefused(f"--address needs {' and '.join(missing)} as well")
    return {
        "address": invocation.address,
        "bootstrap_address": bootstrap_address,
        "trust_domain": trust_domain,
        "bundle_file": invocation.bundle,
    }


def _show_fetched(invocation: Invocation, snapshot: IdentitySnapshot, write: Path | None) -> None:
    now = SystemClock().now()
    document: dict[str, Any] = {
        "spiffe_id": str(snapshot.spiffe_id),
        "serial": snapshot.serial,
        "expires_at": snapshot.not_after,
        "files": {},
    }
    if write is not None:
        document["files"] = _write(snapshot, write)
    say(f"expires {distance(snapshot.not_after, now)}; serial {snapshot.serial}")
    emit(
        invocation.output,
        document,
        lambda: "\n".join(document["files"].values()) or str(snapshot.spiffe_id),
    )


def _write(snapshot: IdentitySnapshot, directory: Path) -> dict[str, str]:
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise FileUnusable(f'"{directory}" cannot be made: {exc.strerror}') from exc
    svid_file, key_file, bundle_file = (
        directory / name for name in ("svid.pem", "key.pem", "bundle.pem")
    )
    anchors = snapshot.x509_bundle(snapshot.spiffe_id.trust_domain).x509_authorities
    write_secret(key_file, snapshot.x509.key_pem.decode())
    write_public(svid_file, snapshot.x509.chain_pem)
    write_public(bundle_file, b"".join(item.public_bytes(Encoding.PEM) for item in anchors))
    return {"svid": str(svid_file), "key": str(key_file), "bundle": str(bundle_file)}


def _read_bundle(path: Path, trust_domain: str) -> TrustBundle:
    from identity_ca.bundle import TrustBundle
    from identity_ca.spiffe_id import TrustDomain

    content = read_input(path)
    domain = TrustDomain.parse(trust_domain)
    if content.lstrip().startswith(b"{"):
        return TrustBundle.from_spiffe_json(domain, content)
    return TrustBundle.from_pem(domain, content)


def _domain_of(spiffe_id: str) -> str:
    """The trust domain an ID claims; whether it may is what the verification finds out."""
    scheme = "spiffe://"
    if not spiffe_id.startswith(scheme):
        raise UsageRefused(
            "the SVID names no SPIFFE ID, so there is nothing to verify",
            hint="idb svid show FILE shows what it says",
        )
    return spiffe_id.removeprefix(scheme).partition("/")[0]
