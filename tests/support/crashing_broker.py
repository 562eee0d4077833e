"""Run as a script: a broker that kills itself (SIGKILL) at a named point of the line.

    python crashing_broker.py DATA_DIR POINT COUNT

- POINT names a call; the process dies before or after its COUNT-th run. "none" never dies.
- Every credential that a signature made is first written to DATA_DIR/signed.log and synced: the
  truth that the ledger is held against.
- Nothing of this is in the product: the calls are wrapped from outside.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from identity_broker.lifecycle import orders
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.holds import Holds
from identity_broker.lifecycle.issue import Issue
from identity_broker.lifecycle.orders import Orders
from identity_broker.lifecycle.record import Record
from identity_broker.lifecycle.rotate import RotateAuthorities
from identity_broker.lifecycle.statement import Statements
from identity_broker.server.app import BoundAddresses, run_broker
from identity_broker.signing import Signing
from identity_broker.store import Store
from identity_broker.store.ledger import Ledger
from identity_broker.telemetry import logs
from identity_ca.issuer import X509Issuer
from identity_ca.jwt import JwtIssuer
from support.line import settings_in

# Point → (owner, method). Each is swept before and after.
POINTS: dict[str, tuple[type, str]] = {
    "prepare": (Signing, "prepare_x509_many"),
    "intend": (Record, "intend"),
    "commit": (Ledger, "_transact_once"),
    "answer": (Ledger, "_answer"),
    "sign": (X509Issuer, "sign_many"),
    "sign_jwt": (JwtIssuer, "sign_many"),
    "conclude": (Record, "conclude"),
    "write": (Store, "_write"),
    "sync": (Directory, "sync"),
    "open": (Orders, "open"),
    "settled": (Issue, "settled"),
    "advance": (Orders, "advance"),
    "sweep": (Orders, "sweep"),
    "replace": (RotateAuthorities, "revoke"),
    "lift": (Holds, "lift"),
    "close": (Statements, "_close"),
}


# Set once the broker is up: what is swept is the line, not the start.
_armed: list[bool] = []


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash_at(owner: type, name: str, *, after: bool, count: int) -> None:
    original = getattr(owner, name)
    runs = 0

    def due() -> bool:
        nonlocal runs
        if not _armed:
            return False
        runs += 1
        return runs == count

    async def later(*args: Any, **kwargs: Any) -> Any:
        now = due()
        if now and not after:
            _die()
        answer = await original(*args, **kwargs)
        if now:
            _die()
        return answer

    def at_once(*args: Any, **kwargs: Any) -> Any:
        now = due()
        if now and not after:
            _die()
        answer = original(*args, **kwargs)
        if now:
            _die()
        return answer

    setattr(owner, name, later if asyncio.iscoroutinefunction(original) else at_once)


def _log_signatures(issuer: type, log: int, name_of: Callable[[Any], str]) -> None:
    original = issuer.sign_many  # type: ignore[attr-defined]

    def sign_many(self: Any, prepared: Any) -> Any:
        signed = original(self, prepared)
        os.write(log, "".join(f"{name_of(item)}\n" for item in signed).encode())
        os.fsync(log)
        return signed

    issuer.sign_many = sign_many  # type: ignore[attr-defined]


async def _main(directory: Path, point: str, count: int) -> None:
    log = os.open(directory / "signed.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    _log_signatures(X509Issuer, log, lambda item: str(item.serial))
    _log_signatures(JwtIssuer, log, lambda item: str(item.jti))
    settings = settings_in(directory, ledger={"unconfirmed_after": "5s"})
    vars(orders)["STEP"] = 3  # a revocation of some has steps to die between

    if point != "none":
        name, _, when = point.partition(":")
        owner, method = POINTS[name]
        _crash_at(owner, method, after=when == "after", count=count)

    def ready(addresses: BoundAddresses) -> None:
        _armed.append(True)
        told = {
            "address": addresses.address,
            "bootstrap_address": addresses.bootstrap_address,
            "http_address": addresses.http_address,
            "admin_socket": str(addresses.admin_socket),
        }
        print(json.dumps(told), flush=True)

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await run_broker(settings, ready=ready, stop=stop)


if __name__ == "__main__":
    logs.configure()  # to standard error: standard output is for the addresses
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
