"""`idb envoy`: Envoys that take their identity from the node agent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from identity_broker.cli.connect import DEFAULT_DIR, dev_state
from identity_broker.cli.envoy_bootstrap import Address, Bootstrap, Inbound, Outbound, Protocol
from identity_broker.cli.errors import UsageRefused
from identity_broker.cli.options import Invocation, dir_option, pass_invocation
from identity_broker.cli.output import emit, say
from identity_broker.cli.tree import IdbGroup
from identity_broker.cli.yaml_text import to_yaml
from identity_broker.dev.state import FILE_NAME, DevState

C = TypeVar("C", bound=Callable[..., Any])

_ENDPOINT_VARIABLE = "SPIFFE_ENDPOINT_SOCKET"


class _HostPort(click.ParamType[Address]):
    """HOST:PORT."""

    name = "HOST:PORT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        """Read it."""
        if isinstance(value, Address):
            return value
        try:
            return Address.parse(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def _address(name: str, text: str) -> Callable[[C], C]:
    return click.option(name, type=_HostPort(), metavar="HOST:PORT", help=text)


@click.group(cls=IdbGroup)
def envoy() -> None:
    """Configure Envoys that take their identity from the node agent."""


@envoy.command(
    params=[dir_option(text="The agent and trust domain of `idb dev --dir DIR` [env: IDB_DIR].")],
    examples=[
        "idb envoy config stock --inbound 0.0.0.0:8443 --app 127.0.0.1:8080 "
        "--accept spiffe://example.org/shop/orders",
        "idb envoy config orders --outbound 127.0.0.1:9001 --peer stock.internal:8443 "
        "--expect spiffe://example.org/shop/stock",
    ],
)
@click.argument("name", metavar="NAME")
@_address("--inbound", "Where peers come in, over mutual TLS.")
@_address("--app", "The application that gets what comes in; it listens on loopback.")
@click.option(
    "--accept", multiple=True, metavar="ID", help="SPIFFE ID, or /path, of a peer let in; repeat."
)
@_address("--outbound", "Where the application's own calls go in; keep it on loopback.")
@_address("--peer", "The peer they go to, over mutual TLS.")
@click.option(
    "--expect", multiple=True, metavar="ID", help="SPIFFE ID, or /path, the peer must have; repeat."
)
@click.option(
    "--spiffe-id",
    metavar="ID",
    help="Identity to present, where the process has several; else its first.",
)
@click.option(
    "--check-revocation",
    is_flag=True,
    help="Refuse revoked peers of the own trust domain, and everybody while no list is fresh.",
)
@click.option(
    "--protocol",
    type=click.Choice([item.value for item in Protocol]),
    default=Protocol.HTTP.value,
    show_default=True,
    help="What flows through; http is HTTP/1.1 and HTTP/2, gRPC included.",
)
@click.option(
    "--workload-api",
    metavar="ADDRESS",
    help="The agent's socket, unix:///PATH [env: SPIFFE_ENDPOINT_SOCKET].",
)
@click.option("--trust-domain", metavar="NAME", help="What a /path is completed with.")
@_address("--admin", "Where Envoy's admin interface listens; off if not given.")
@pass_invocation
def config(
    invocation: Invocation,
    name: str,
    inbound: Address | None,
    app: Address | None,
    accept: tuple[str, ...],
    outbound: Address | None,
    peer: Address | None,
    expect: tuple[str, ...],
    spiffe_id: str | None,
    check_revocation: bool,
    protocol: str,
    workload_api: str | None,
    trust_domain: str | None,
    admin: Address | None,
) -> None:
    """Print a bootstrap for the Envoy beside a service: YAML, or JSON with -o json.

    Peers are let in, and spoken to, by the SPIFFE IDs named here and no others. The bootstrap
    holds no secret: Envoy fetches its certificate and the authorities from the agent, and gets
    new ones while it runs.
    """
    _check(inbound, app, accept, "--inbound", "--app", "--accept")
    _check(outbound, peer, expect, "--outbound", "--peer", "--expect")
    if not (inbound or outbound):
        raise UsageRefused(
            "an Envoy without --inbound and --outbound does nothing",
            hint="idb envoy config --help has an example of each",
        )
    identities = _Identities(invocation, trust_domain)
    bootstrap = Bootstrap(
        name=name,
        socket=_socket(invocation, workload_api),
        svid=identities.named(spiffe_id) if spiffe_id else "default",
        protocol=Protocol(protocol),
        check_revocation=check_revocation,
        admin=admin,
        inbound=Inbound(inbound, app, tuple(map(identities.named, accept)))
        if inbound and app
        else None,
        outbound=Outbound(outbound, peer, tuple(map(identities.named, expect)))
        if outbound and peer
        else None,
    )
    if check_revocation and bootstrap.trusts_several:
        raise UsageRefused(
            "--check-revocation is for peers of the own trust domain",
            hint="give the service an Envoy for each trust domain, or leave it out",
        )
    _warn(bootstrap)
    document = bootstrap.document()
    emit(invocation.output, document, lambda: to_yaml(document).rstrip("\n"))


def _check(
    listen: Address | None, other: Address | None, ids: tuple[str, ...], *names: str
) -> None:
    """Either all three options of a direction, or none."""
    given = [listen is not None, other is not None, bool(ids)]
    if any(given) and not all(given):
        missing = [name for name, there in zip(names, given, strict=True) if not there]
        raise UsageRefused(f"{' and '.join(missing)} must be given as well")


def _warn(bootstrap: Bootstrap) -> None:
    outbound, inbound = bootstrap.outbound, bootstrap.inbound
    if outbound and not outbound.listen.is_loopback:
        say(f"warning: whoever reaches {outbound.listen} speaks as this service; use 127.0.0.1")
    if inbound and not inbound.app.is_loopback:
        say(f"warning: what comes in leaves for {inbound.app} without TLS")
    if bootstrap.admin and not bootstrap.admin.is_loopback:
        say(f"warning: whoever reaches {bootstrap.admin} can stop and read this Envoy")


class _Identities:
    """Makes short names whole, and refuses what is no SPIFFE ID."""

    def __init__(self, invocation: Invocation, trust_domain: str | None) -> None:
        self._invocation = invocation
        self._trust_domain = trust_domain

    def named(self, text: str) -> str:
        """A SPIFFE ID, or a path in the trust domain made one.

        Raises:
            UsageRefused: it is neither, or nothing says the trust domain.
        """
        from identity_ca.errors import SpiffeIdError
        from identity_ca.spiffe_id import SpiffeId

        whole = f"spiffe://{self._domain(text)}{text}" if text.startswith("/") else text
        try:
            return str(SpiffeId.parse(whole))
        except SpiffeIdError as exc:
            raise UsageRefused(f'"{text}": {exc}') from exc

    def _domain(self, text: str) -> str:
        if self._trust_domain is None:
            state = _dev_state(self._invocation)
            if state is None:
                raise UsageRefused(
                    "a path alone names no identity where no --dir says the trust domain",
                    hint=f"spiffe://TRUST-DOMAIN{text}, or --trust-domain NAME",
                )
            self._trust_domain = state.trust_domain
        return self._trust_domain


def _socket(invocation: Invocation, workload_api: str | None) -> str:
    """The path of the agent's socket: named, of --dir, of the environment, of ./.dev."""
    address = workload_api
    if address is None and (invocation.dir or not os.environ.get(_ENDPOINT_VARIABLE)):
        state = _dev_state(invocation)
        address = state.workload_api if state else None
    address = address or os.environ.get(_ENDPOINT_VARIABLE, "")
    path = address.removeprefix("unix:").removeprefix("//")
    if not address.startswith("unix:") or not path.startswith("/"):
        raise UsageRefused(
            f'"{address}" is not the address of an agent on this machine'
            if address
            else "nothing says where the agent's socket is",
            hint="--workload-api unix:///run/identity-broker/workload.sock; "
            "idb agent status says where it is",
        )
    return path


def _dev_state(invocation: Invocation) -> DevState | None:
    """What `idb dev` runs in the directory that is meant, if any is."""
    named = invocation.dir or os.environ.get("IDB_DIR")
    if not named and not (DEFAULT_DIR / FILE_NAME).exists():
        return None
    return dev_state(invocation)
