"""How a service of the demonstration becomes somebody: the SDK, with a join token in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from identity_broker.dev.demo.wire import emit
from identity_client import IdentitySnapshot, IdentitySource

_READY_SECONDS = 30.0


def start_source(described: dict[str, Any]) -> IdentitySource:
    """A source that has an identity; every certificate it ever gets is told to the stage."""
    source = IdentitySource.from_join_token(
        address=described["address"],
        bootstrap_address=described["bootstrap_address"],
        trust_domain=described["trust_domain"],
        bundle_file=described["bundle_file"],
        token_file=described["token_file"],
        spiffe_id=described["spiffe_id"],
    )
    source.subscribe(_tell)
    source.wait_ready(_READY_SECONDS)
    return source


def copy_out(snapshot: IdentitySnapshot, file: Path) -> None:
    """What somebody who reads this process's memory walks away with."""
    stolen = {
        "key": snapshot.x509.key_pem.decode(),
        "chain": snapshot.x509.chain_pem.decode(),
        "roots": snapshot.bundle.roots_pem.decode(),
        "serial": snapshot.serial,
    }
    file.touch(mode=0o600)
    file.write_text(json.dumps(stolen))


def _tell(snapshot: IdentitySnapshot) -> None:
    emit(
        "identity",
        spiffe_id=str(snapshot.spiffe_id),
        serial=snapshot.serial,
        expires_at=snapshot.expires_at,
    )
