"""`idb svid`: fetch, show and verify SVIDs.

- `fetch` asks a node agent's Workload API; with a join token it is a node of its own, which makes
  its key here.
- `show` and `verify` work without a broker.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from identity_broker.cli.connect import DEFAULT_DIR, dev_state
from identity_broker.cli.errors import UsageRefused
from identity_broker.cli.files import read_input, read_secret
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import distance, emit, say
from identity_broker.cli.tree import IdbGroup
from identity_broker.dev.state import FILE_NAME
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_ca.bundle import TrustBundle
    from identity_client.settings import SourceSettings
    from identity_client.workload_api.settings import WorkloadApiSettings

_FILE = click.Path(path_type=Path)
_ENDPOINT_VARIABLE = "SPIFFE_ENDPOINT_SOCKET"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # RFC 3986, section 3.1


@click.group(cls=IdbGroup)
def svid() -> None:
    """Fetch, show and verify SVIDs."""


@svid.command(
    connects=True,
    examples=[
        "idb --dir .dev svid fetch --write svids",
        "idb svid fetch --workload-api unix:///run/identity-agent/api.sock --watch --write svids "
        "--exec 'nginx -s reload'",
        "idb --dir .dev svid fetch --token-file web-1.token --spiffe-id /shop/orders",
        "idb --dir .dev svid fetch --state-dir web-1.state",
    ],
)
@click.option(
    "--workload-api",
    metavar="ADDRESS",
    help="A node agent's Workload API: a socket's path, unix:///PATH or tcp://IP:PORT; else that "
    f"of --dir, else [env: {_ENDPOINT_VARIABLE}].",
)
@click.option("--spiffe-id", metavar="ID", help="Who to be (ID or /path); the first one if none.")
@click.option("--hint", metavar="TEXT", help="The identity with this hint (Workload API).")
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
    help="Write svid.pem, key.pem (0600), bundle.pem, crl.pem and ocsp.der (the OCSP answer to "
    "staple) there, and the same as a SPIFFE credential folder; all of them change at once.",
)
@click.option(
    "--exec",
    "command",
    metavar="COMMAND",
    help="Run after every complete replacement of the files, without a shell.",
)
@click.option("--watch", is_flag=True, help="Stay, and follow every rotation until stopped.")
@click.option("--bootstrap-address", metavar="HOST:PORT", help="With --address.")
@click.option("--trust-domain", metavar="NAME", help="With --address.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="How long to wait for the first identity  [default: 15; with --watch for ever]",
)
@pass_invocation
def fetch(
    invocation: Invocation,
    workload_api: str | None,
    spiffe_id: str | None,
    hint: str | None,
    token_file: Path | None,
    token: str | None,
    state_dir: Path | None,
    write: Path | None,
    command: str | None,
    watch: bool,
    bootstrap_address: str | None,
    trust_domain: str | None,
    timeout: float | None,
) -> None:
    """Fetch an X.509-SVID: from a node agent's Workload API, or as a node of its own.

    An agent needs no secret. With a token or --state-dir this process attests by itself: to the
    broker of --dir, or --address with --bootstrap-address, --trust-domain and --bundle. Keys
    leave only into --write DIR.
    """
    from identity_broker.cli import svid_fetch

    delivery = svid_fetch.Delivery(
        output=invocation.output,
        write=write,
        hook=svid_fetch.parse_hook(command, write=write),
        watch=watch,
        timeout=timeout or (None if watch else 15.0),
    )
    settings: SourceSettings | WorkloadApiSettings
    if token_file is None and not token and state_dir is None:
        settings = _asking(invocation, workload_api, spiffe_id, hint, trust_domain)
    else:
        if workload_api is not None or hint is not None:
            raise UsageRefused("a Workload API wants no token and no --state-dir")
        where = _whereabouts(invocation, bootstrap_address, trust_domain)
        token = token if token_file is None else read_secret(token_file)
        settings = _joining(where, token, spiffe_id, state_dir)
    svid_fetch.fetch(settings, delivery)


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


def _asking(
    invocation: Invocation,
    workload_api: str | None,
    spiffe_id: str | None,
    hint: str | None,
    trust_domain: str | None,
) -> WorkloadApiSettings:
    """Settings for the Workload API that is meant."""
    from identity_client.workload_api.settings import WorkloadApiSettings

    if workload_api is not None and not _SCHEME.match(workload_api):
        # A socket, as the shell knows it.
        workload_api = f"unix://{quote(str(Path(workload_api).absolute()))}"
    endpoint = workload_api or _workload_api(invocation)
    if spiffe_id is not None and spiffe_id.startswith("/"):
        if trust_domain is None and workload_api is None and _names_dev(invocation):
            trust_domain = dev_state(invocation).trust_domain
        if trust_domain is None:
            raise UsageRefused(
                "a path alone names no identity where no --dir says the trust domain",
                hint=f"--spiffe-id spiffe://TRUST-DOMAIN{spiffe_id}",
            )
        spiffe_id = f"spiffe://{trust_domain}{spiffe_id}"
    return WorkloadApiSettings.make(endpoint, spiffe_id=spiffe_id, hint=hint)


def _workload_api(invocation: Invocation) -> str:
    """The address of the agent in --dir, else of the environment, else in ./.dev."""
    named = os.environ.get(_ENDPOINT_VARIABLE, "")
    if invocation.address is None and (
        invocation.dir is not None or (not named and _names_dev(invocation))
    ):
        named = dev_state(invocation).workload_api
    if not named or invocation.address is not None:
        raise UsageRefused(
            "there is no agent to ask, and a node of its own needs a join token or the "
            "--state-dir of an earlier fetch",
            hint="--workload-api unix:///PATH where an agent runs; else: "
            "idb token generate --write web-1.token",
        )
    return named


def _names_dev(invocation: Invocation) -> bool:
    named = invocation.dir is not None or bool(os.environ.get("IDB_DIR"))
    return named or (DEFAULT_DIR / FILE_NAME).exists()


def _joining(
    where: dict[str, Any], token: str | None, spiffe_id: str | None, state_dir: Path | None
) -> SourceSettings:
    """Settings for a node that joins the broker by itself."""
    from identity_client.attestation import JoinTokenAttestor
    from identity_client.settings import SourceSettings

    if spiffe_id is not None and spiffe_id.startswith("/"):
        spiffe_id = f"spiffe://{where['trust_domain']}{spiffe_id}"
    # With a state directory that holds a node, the token is not asked for.
    attestor = JoinTokenAttestor(token or "idbt_none")
    return SourceSettings.make(attestor, **where, spiffe_id=spiffe_id, state_dir=state_dir)


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
