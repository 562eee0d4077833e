"""`idb agent`: the node agent, and how it is doing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from identity_broker.cli.config import config_option, set_option
from identity_broker.cli.connect import agent_socket, dev_state
from identity_broker.cli.foreground import log_stream, stop_on_signal
from identity_broker.cli.options import Invocation, SharedOption, dir_option, pass_invocation
from identity_broker.cli.output import (
    OutputFormat,
    Style,
    Text,
    emit,
    facts,
    moment,
    say,
)
from identity_broker.cli.tree import IdbCommand, IdbGroup
from identity_broker.errors import AgentNotReady

if TYPE_CHECKING:
    from datetime import datetime

    from identity_broker.agent.app import AgentAddresses
    from identity_broker.config.agent_settings import AgentSettings
    from identity_client.agent_client import AgentStatus


@click.group(cls=IdbGroup)
def agent() -> None:
    """Run a node agent, and see how it is doing."""


def _setting(name: str, key: str, metavar: str, text: str, **more: Any) -> Callable[..., Any]:
    """An option that is short for --set KEY=VALUE."""
    return click.option(name, key.replace(".", "__"), metavar=metavar, help=text, **more)


@agent.command(
    examples=[
        "idb agent run --config /etc/identity-broker/agent.toml",
        "idb agent run --trust-domain example.org --broker broker.example.org:8081 "
        "--bootstrap broker.example.org:8082 --bundle-file root.pem --join-token-file token",
        "idb --dir .dev agent run --join-token-file db-1.token --runtime-dir db-1",
    ],
    params=[dir_option(text="Join the broker of the `idb dev` that runs in DIR.")],
)
@config_option
@set_option
@_setting("--trust-domain", "agent.trust_domain", "NAME", "The trust domain the broker serves.")
@_setting("--broker", "broker.address", "HOST:PORT", "The broker's mTLS listener.")
@_setting("--bootstrap", "broker.bootstrap_address", "HOST:PORT", "Its bootstrap listener.")
@_setting("--bundle-file", "trust.bundle_file", "FILE", "Root certificates (PEM) to trust first.")
@_setting("--bundle-url", "trust.bundle_url", "URL", "Where to get them instead.")
@_setting(
    "--bundle-fingerprint",
    "trust.bundle_fingerprints",
    "SHA256",
    "SHA-256 of a root certificate that is believed from --bundle-url; repeatable.",
    multiple=True,
)
@_setting(
    "--insecure-bootstrap",
    "trust.insecure_bootstrap",
    "",
    "Believe whatever --bundle-url answers first. For experiments alone.",
    is_flag=True,
    default=None,
)
@_setting("--join-token-file", "node.join_token_file", "FILE", "Join with the token in this file.")
@_setting("--cert-file", "node.cert_file", "FILE", "Join with this certificate (x509_pop) …")
@_setting("--key-file", "node.key_file", "FILE", "… and its key.")
@_setting(
    "--data-dir", "agent.data_dir", "DIR", "Keep the node's key here, to restart without a token."
)
@_setting("--runtime-dir", "agent.runtime_dir", "DIR", "Directory of both sockets.")
@_setting("--workload-api", "agent.workload_api", "PATH", "Socket of the Workload API.")
@_setting("--admin-socket", "agent.admin_socket", "PATH", "Socket of `idb agent status`.")
@pass_invocation
def run(
    invocation: Invocation,
    /,
    config_file: Path | None,
    overrides: dict[str, str],
    **given: Any,
) -> None:
    """Run a node agent until SIGTERM or Ctrl-C.

    It proves this machine to the broker, keeps the node's SVID renewed, and serves the SPIFFE
    Workload API (and Envoy's SDS) on a Unix socket: no process here needs a secret.

    When its sockets are bound, stdout says where (with -o json: one line); logs go to stderr. The
    broker may come later.
    """
    import asyncio

    settings = _load(config_file, {**_of_dev(invocation), **overrides}, given)
    if settings.trust.insecure_bootstrap:
        say(
            "WARNING: --insecure-bootstrap believes whoever answers first. Whoever can stand "
            "between this machine and the broker can hand every process here a false identity. "
            "Pin the root instead: --bundle-fingerprint"
        )

    def ready(bound: AgentAddresses) -> None:
        document = {"workload_api": bound.workload_api, "admin_socket": str(bound.admin_socket)}
        if bound.http_address:
            document["http_address"] = bound.http_address
        if invocation.output is OutputFormat.JSON:
            print(json.dumps(document), flush=True)
        else:
            print(facts(list(document.items())), flush=True)

    with log_stream(settings.log) as stream:
        asyncio.run(_serve(settings, ready, stream))


def _of_dev(invocation: Invocation) -> dict[str, str]:
    """Where the broker of the `idb dev` in --dir is, and how to trust it.

    Raises:
        DevNotRunning: none runs there.
    """
    if invocation.dir is None:
        return {}
    state = dev_state(invocation)
    return {
        "agent.trust_domain": state.trust_domain,
        "broker.address": state.broker.address,
        "broker.bootstrap_address": state.broker.bootstrap_address,
        "trust.bundle_file": state.bundle_file,
    }


async def _serve(
    settings: AgentSettings, ready: Callable[[AgentAddresses], None], stream: TextIO
) -> None:
    """Run the agent until a signal."""
    from identity_broker.agent.app import run_agent
    from identity_broker.telemetry.logs import configure

    configure(settings.log.level, settings.log.format, stream)
    await run_agent(settings, ready=ready, stop=stop_on_signal())


@agent.command(
    cls=IdbCommand,
    params=[
        dir_option(text="The agent that `idb dev --dir DIR` runs [env: IDB_DIR]."),
        SharedOption(
            "--socket",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="The agent's admin socket [env: IDB_AGENT_SOCKET].",
        ),
    ],
    examples=["idb agent status", "idb --dir .dev agent status -o json"],
)
@pass_invocation
def status(invocation: Invocation) -> None:
    """Say how a node agent of this machine is doing.

    For root and the agent's own user. Exit code 0: it serves what it has, even if something is
    wrong; 6: it hands out nothing.
    """
    from identity_client.agent_client import AgentClient, AgentHealth

    with AgentClient(agent_socket(invocation)) as client:
        found = client.status()
    emit(invocation.output, found, lambda: _status_text(found))
    if found.health is AgentHealth.DOWN:
        raise AgentNotReady(
            "the agent hands out nothing",
            hint=found.problems[0] if found.problems else "its log says why",
        )


def _status_text(found: AgentStatus) -> str:
    from identity_client.clock import utc_now

    now = utc_now()
    style = {"ok": Style.GOOD, "degraded": Style.WARN}.get(found.health.value, Style.BAD)
    pairs: list[tuple[str, str | Text]] = [("health", Text(found.health.value, style))]
    pairs += [("problem", Text(problem, Style.WARN)) for problem in found.problems]
    pairs += [
        ("node", found.node_id or "- (not attested yet)"),
        ("its SVID", f"{found.node_serial or '-'}, ends {moment(found.node_expires_at, now=now)}"),
        ("broker", f"{found.broker_address}, {'connected' if found.connected else 'away'}"),
        ("last heard", moment(found.heard_at, now=now)),
        ("revision", str(found.revision)),
        ("entries", str(found.entries)),
        ("X.509-SVIDs", f"{found.x509_svids}, {found.overdue} overdue"),
        ("JWT-SVIDs", str(found.jwt_svids)),
        ("revocations", _revocations(found, now)),
        ("followers", str(found.followers)),
        ("connections", str(found.connections)),
        ("Workload API", found.workload_api),
        ("version", found.version),
        ("started", moment(found.started_at, now=now)),
    ]
    return facts(pairs)


def _revocations(found: AgentStatus, now: datetime) -> str | Text:
    if found.revocations_fresh:
        return f"{found.revocations}, up to date"
    since = moment(found.heard_at, now=now)
    return Text(f"{found.revocations}, as of {since}; there may be more", Style.WARN)


@agent.group(cls=IdbGroup)
def config() -> None:
    """Check and show an agent's configuration."""


@config.command()
@config_option
@set_option
@pass_invocation
def check(invocation: Invocation, config_file: Path | None, overrides: dict[str, str]) -> None:
    """Check an agent's configuration: every problem at once, never a value."""
    settings = _load(config_file, overrides, {})
    say("the configuration can be used")
    document = {"ok": True, "trust_domain": str(settings.agent.trust_domain)}
    emit(invocation.output, document, lambda: "")


@config.command()
@config_option
@set_option
@pass_invocation
def show(invocation: Invocation, config_file: Path | None, overrides: dict[str, str]) -> None:
    """Show the values in effect, defaults included."""
    from identity_broker.config.reference import masked

    shown = masked(_load(config_file, overrides, {}))
    emit(invocation.output, shown, lambda: facts(list(shown.items())))


def _load(
    config_file: Path | None, overrides: dict[str, str], given: dict[str, Any]
) -> AgentSettings:
    """Read an agent's configuration; options win over --set.

    Raises:
        ConfigError: lists every problem.
    """
    from identity_broker.config.loading import load_agent

    options = {
        key.replace("__", "."): list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if value is not None and value != ()
    }
    return load_agent(config_file, {**overrides, **options})
