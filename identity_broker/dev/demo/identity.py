"""How a service of the demonstration becomes somebody: the SDK asks the agent on this machine.

- Nothing is configured but the agent's socket, by SPIFFE_ENDPOINT_SOCKET; there is no secret.
"""

from __future__ import annotations

import json
from pathlib import Path

from identity_broker.dev.demo.wire import emit
from identity_client import IdentitySnapshot, IdentitySource

_READY_SECONDS = 30.0


def start_source() -> IdentitySource:
    """A source that has an identity; every certificate it ever gets is told to the stage."""
    source = IdentitySource.from_workload_api()
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
