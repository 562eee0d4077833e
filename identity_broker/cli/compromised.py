"""`idb compromised`: a key is out. End everything issued to it, and refuse it for ever."""

from __future__ import annotations

from pathlib import Path

import click

from identity_broker.cli.confirm import yes_option
from identity_broker.cli.connect import Session
from identity_broker.cli.errors import UsageRefused
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.tree import IdbCommand


@click.command(
    cls=IdbCommand,
    connects=True,
    examples=["idb compromised --key leaked.pem", "idb compromised --key web-1.csr --yes"],
)
@click.option(
    "--key",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The key, PEM or DER: private key, public key, certificate or CSR; - is stdin. A private "
    "key does not leave this process. (An admin's own --key stands before `compromised`.)",
)
@click.option(
    "--fingerprint", default="", metavar="HEX", help="SHA-256 of its SubjectPublicKeyInfo."
)
@click.option("--comment", default="", metavar="TEXT", help="Your own words, for the record.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show what would be hit.")
@click.option("--no-wait", is_flag=True, help="Do not wait to see which verifiers have heard.")
@yes_option
@pass_invocation
def compromised(
    invocation: Invocation,
    file: Path | None,
    fingerprint: str,
    comment: str,
    only_plan: bool,
    no_wait: bool,
    yes: bool,
) -> None:
    """Revoke everything ever issued to a key, and refuse the key for ever.

    As idb revoke --key-fingerprint with the reason key-compromise.
    """
    if (file is None) == (not fingerprint):
        raise UsageRefused(
            "name the key: by a file, or by its fingerprint",
            hint="idb compromised --key FILE, or idb compromised --fingerprint HEX",
        )
    from identity_broker.cli import revoking
    from identity_client.admin import Subject, SubjectKind

    if file is not None:
        from identity_broker.cli.key_document import fingerprint_in

        fingerprint = fingerprint_in(file)
    order = revoking.Order(reason="key-compromise", comment=comment)
    subject = Subject(SubjectKind.KEY_FINGERPRINT, fingerprint)
    with Session.open(invocation) as session:
        if only_plan:
            revoking.show_plan(invocation, session, subject, order)
        else:
            revoking.carry_out(invocation, session, subject, order, yes=yes, wait=not no_wait)
