"""`idb authority`: the signing authorities of the trust domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import (
    Style,
    Text,
    distance,
    emit,
    facts,
    moment,
    rfc3339,
    table,
)
from identity_broker.cli.pem import certificate_pem, public_key_pem
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import Authority

_COLOURS = {"active": Style.GOOD, "tainted": Style.BAD, "revoked": Style.BAD, "old": Style.DIM}


@click.group(cls=IdbGroup)
def authority() -> None:
    """See the signing authorities."""


@authority.command("list", connects=True)
@click.option("--kind", type=click.Choice(["x509", "jwt"]))
@pass_invocation
def list_authorities(invocation: Invocation, kind: str | None) -> None:
    """List the authorities that are trusted or about to be."""
    from identity_client.admin import AuthorityKind

    with Session.open(invocation) as session:
        found = session.admin.authorities.list(AuthorityKind(kind) if kind else None)
    now = SystemClock().now()

    def render() -> str:
        rows = [
            [
                one.id,
                one.kind.value,
                _state(one),
                one.key_id,
                one.algorithm,
                one.upstream,
                distance(one.expires_at, now),
            ]
            for one in found
        ]
        columns = ["id", "kind", "state", "key", "algorithm", "upstream", "expires"]
        return table(columns, rows, empty="there is no authority; idb doctor says why")

    emit(invocation.output, {"authorities": [_document(one) for one in found]}, render)


@authority.command(connects=True)
@click.argument("authority_id", metavar="ID")
@pass_invocation
def show(invocation: Invocation, authority_id: str) -> None:
    """Show one authority with its certificates."""
    with Session.open(invocation) as session:
        found = session.admin.authorities.get(authority_id)
    now = SystemClock().now()

    def render() -> str:
        return facts(
            [
                ("id", found.id),
                ("kind", found.kind.value),
                ("state", _state(found)),
                ("key", found.key_id),
                ("algorithm", found.algorithm),
                ("upstream", found.upstream),
                ("not before", moment(found.not_before, now=now)),
                ("expires", moment(found.expires_at, now=now)),
                ("public key", public_key_pem(found.public_key).strip()),
                ("certificates", _pem(found.certificate_chain)),
                ("roots", _pem(found.roots)),
            ]
        )

    emit(invocation.output, _document(found), render)


def _state(one: Authority) -> str | Text:
    style = _COLOURS.get(one.state.value)
    return Text(one.state.value, style) if style else one.state.value


def _pem(certificates: tuple[bytes, ...]) -> str:
    return "".join(map(certificate_pem, certificates)).strip() or "-"


def _document(one: Authority) -> dict[str, Any]:
    return {
        "id": one.id,
        "kind": one.kind.value,
        "state": one.state.value,
        "key_id": one.key_id,
        "algorithm": one.algorithm,
        "upstream": one.upstream,
        "not_before": rfc3339(one.not_before) if one.not_before else None,
        "expires_at": rfc3339(one.expires_at) if one.expires_at else None,
        "public_key_pem": public_key_pem(one.public_key),
        "certificate_chain_pem": [certificate_pem(der) for der in one.certificate_chain],
        "roots_pem": [certificate_pem(der) for der in one.roots],
    }
