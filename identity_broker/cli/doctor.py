"""`idb doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from identity_broker.cli import checks
from identity_broker.cli.checks import Finding, Verdict
from identity_broker.cli.config import config_option, load_checked
from identity_broker.cli.connect import dev_state, target_of
from identity_broker.cli.errors import NotReady
from identity_broker.cli.failure import failure_of
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import Row, Style, Text, emit, table
from identity_broker.cli.tree import IdbCommand
from identity_broker.domain.clock import SystemClock
from identity_broker.errors import BrokerError

if TYPE_CHECKING:
    from identity_broker.config.settings import Settings

_STYLES = {Verdict.OK: Style.GOOD, Verdict.WARN: Style.WARN, Verdict.FAIL: Style.BAD}


@click.command(
    cls=IdbCommand,
    connects=True,
    examples=["idb --dir .dev doctor", "idb doctor --config /etc/identity-broker/broker.toml"],
)
@config_option
@click.option("--http", metavar="HOST:PORT", help="The broker's HTTP port, when not known.")
@pass_invocation
def doctor(invocation: Invocation, config_file: Path | None, http: str | None) -> None:
    """Say what is wrong and what to do about it.

    Looks at the configuration, the admin socket, every dependency the broker names, both clocks,
    certificate expiries, file permissions, and whether revocation lists, OCSP and ledger agree.
    Changes nothing. Exit code 6 when something fails.
    """
    findings = list(_examine(invocation, config_file, http))
    worst = max(findings, key=lambda one: list(Verdict).index(one.verdict), default=None)
    emit(
        invocation.output,
        {"verdict": worst.verdict if worst else Verdict.OK, "findings": findings},
        lambda: _table(findings),
    )
    failed = sum(one.verdict is Verdict.FAIL for one in findings)
    if failed:
        raise NotReady(
            f"{failed} of {len(findings)} checks failed",
            hint="the last column above says what to do",
        )


def _examine(
    invocation: Invocation, config_file: Path | None, http: str | None
) -> Iterator[Finding]:
    now = SystemClock().now()
    settings: Settings | None = None
    if config_file is not None:
        try:
            settings = load_checked(config_file, {})
        except BrokerError as error:
            failure = failure_of(error)
            for problem in failure.problems or (failure.message,):
                fix = f"correct it in {config_file}"
                yield Finding("configuration", Verdict.FAIL, problem, fix)
            return
        yield Finding("configuration", Verdict.OK, str(config_file))
        if not (invocation.socket or invocation.address):
            invocation.socket = settings.server.admin_socket
        http = http or settings.server.http_address
        yield from checks.private_files(settings.server.data_dir)
    elif not (invocation.socket or invocation.address):
        state = dev_state(invocation)
        http = http or state.broker.http_address
        yield from checks.private_files(Path(state.broker.admin_socket).parent)
        yield from checks.admin_socket(Path(state.broker.admin_socket))
    yield from _administration(invocation, http)
    if http is not None:
        yield from checks.readiness(http, now)


def _administration(invocation: Invocation, http: str | None) -> Iterator[Finding]:
    from identity_client.admin import AdminClient
    from identity_client.errors import IdentityError

    try:
        with AdminClient(target_of(invocation)) as admin:
            yield from checks.administration(admin, SystemClock().now())
            if http is not None:
                yield from checks.revocation_status(admin, http, SystemClock().now())
    except IdentityError as error:
        yield Finding("admin socket", Verdict.FAIL, error.message, error.hint)


def _table(findings: list[Finding]) -> str:
    rows: list[Row] = [
        [Text(one.verdict.value, _STYLES[one.verdict]), one.check, one.detail, one.fix]
        for one in findings
    ]
    return table(["", "check", "found", "what to do"], rows, empty="nothing to look at")
