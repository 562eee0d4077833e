"""Grants: the permission to issue one credential.

- Only `lifecycle.authorize` builds a Grant: its constructor refuses anyone without the seal.
- A Grant fixes everything about the credential but its key: a CSR contributes no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Final

from identity_broker.errors import InvariantViolated
from identity_ca.spiffe_id import SpiffeId


class GrantKind(Enum):
    """Whom the credential is for; decides the certificate profile."""

    WORKLOAD = "workload"
    NODE = "node"
    BROKER = "broker"


class Seal:
    """Proof that `lifecycle.authorize` is the one building. Nothing else imports SEAL."""


SEAL: Final = Seal()


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to issue one credential for `spiffe_id` to `node_id`.

    Raises:
        InvariantViolated: built outside `lifecycle.authorize`.
    """

    seal: Seal
    kind: GrantKind
    spiffe_id: SpiffeId
    node_id: SpiffeId | None
    x509_ttl: timedelta
    jwt_ttl: timedelta
    entry_id: str = ""
    entry_revision: int = 0
    dns_names: tuple[str, ...] = ()
    hint: str = ""
    supersedes: str = ""

    def __post_init__(self) -> None:
        if self.seal is not SEAL:
            raise InvariantViolated(detail="a Grant was built outside lifecycle.authorize")
