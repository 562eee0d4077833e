"""The demonstration's intruder: a process of its own, with what it stole and nothing else.

The first line on stdin: {"inventory": "host:port"}. Commands, each answered by an event:
- {"replay": API_KEY} calls over plain text with the stolen key.
- {"replay_tls": API_KEY, "roots": PEM, "peer": SPIFFE_ID} the same over TLS, with no certificate.
- {"forge": SPIFFE_ID, "roots": PEM, "peer": SPIFFE_ID} calls with a self-made certificate.
- {"ask_agent": true} asks the agent for an identity, as the services do.
- {"impersonate": FILE, "peer": SPIFFE_ID} takes a stolen X.509-SVID and calls without pause, on one
  connection that stays open and on a new one each time, and tells when either is refused.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from identity_broker.dev.demo.wire import (
    API_KEY_HEADER,
    RESERVE,
    Message,
    commands,
    emit,
    reason_of,
    unary,
)
from identity_client import IdentityError, IdentitySource
from identity_client.naming import parse_spiffe_id, server_name

_ITEM = {"item": "everything"}
_CALL_SECONDS = 3.0
_PAUSE_SECONDS = 0.01
_ASK_SECONDS = 1.0


class Intruder:
    """Calls `inventory` with whatever it has."""

    def __init__(self, inventory: str) -> None:
        self._inventory = inventory
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def replay(self, api_key: str) -> None:
        """The stolen key, over plain text."""
        with grpc.insecure_channel(self._inventory) as channel:
            emit("replayed", reason=_try(channel, api_key))

    def replay_tls(self, api_key: str, roots: str, peer: str) -> None:
        """The stolen key, over TLS without a certificate."""
        credentials = grpc.ssl_channel_credentials(roots.encode())
        with self._secure(credentials, peer) as channel:
            emit("replayed", reason=_try(channel, api_key))

    def forge(self, spiffe_id: str, roots: str, peer: str) -> None:
        """A certificate that says the right name and that nobody signed but us."""
        key, certificate = _self_made(spiffe_id)
        credentials = grpc.ssl_channel_credentials(roots.encode(), key, certificate)
        with self._secure(credentials, peer) as channel:
            emit("forged", reason=_try(channel))

    def ask_agent(self) -> None:
        """The services' own way: the agent's socket, which is open to everybody."""
        try:
            with IdentitySource.from_workload_api() as source:
                source.wait_ready(_ASK_SECONDS)
        except IdentityError as error:
            cause = error.__cause__
            emit(
                "asked_agent",
                reason=cause.reason if isinstance(cause, IdentityError) else error.reason,
            )
        else:
            emit("asked_agent", reason="")

    def impersonate(self, file: str, peer: str) -> None:
        """A stolen X.509-SVID with its key, on an open connection and on new ones."""
        stolen = json.loads(Path(file).read_text())
        credentials = grpc.ssl_channel_credentials(
            stolen["roots"].encode(), stolen["key"].encode(), stolen["chain"].encode()
        )
        open_channel = self._secure(credentials, peer)

        def on_open() -> str:
            return _try(open_channel)

        def on_new() -> str:
            with self._secure(credentials, peer) as channel:
                return _try(channel)

        for kind, call in (("open", on_open), ("new", on_new)):
            thread = threading.Thread(target=self._until_refused, args=(kind, call), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End what runs."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _until_refused(self, kind: str, call: Callable[[], str]) -> None:
        served = 0
        while not self._stop.wait(_PAUSE_SECONDS):
            started = time.monotonic()
            reason = call()
            if reason:
                emit("refused", connection=kind, reason=reason, started=started, served=served)
                return
            served += 1
            if served == 1:
                emit("served", connection=kind)

    def _secure(self, credentials: grpc.ChannelCredentials, peer: str) -> grpc.Channel:
        options = (
            ("grpc.ssl_target_name_override", server_name(parse_spiffe_id(peer))),
            ("grpc.use_local_subchannel_pool", 1),
        )
        return grpc.secure_channel(self._inventory, credentials, options)


def main() -> None:
    """Do what is asked until stdin closes."""
    told = commands()
    asked = next(told)
    intruder = Intruder(asked["inventory"])
    emit("ready", address="")
    for command in told:
        _obey(intruder, command)
    intruder.stop()


def _obey(intruder: Intruder, command: Message) -> None:
    if "replay" in command:
        intruder.replay(command["replay"])
    elif "replay_tls" in command:
        intruder.replay_tls(command["replay_tls"], command["roots"], command["peer"])
    elif "forge" in command:
        intruder.forge(command["forge"], command["roots"], command["peer"])
    elif "ask_agent" in command:
        intruder.ask_agent()
    elif "impersonate" in command:
        intruder.impersonate(command["impersonate"], command["peer"])


def _try(channel: grpc.Channel, api_key: str = "") -> str:
    """Call once; return why it was refused, or nothing."""
    metadata = ((API_KEY_HEADER, api_key),) if api_key else ()
    try:
        unary(channel, RESERVE)(_ITEM, timeout=_CALL_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        return reason_of(error)
    return ""


def _self_made(spiffe_id: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.fromtimestamp(time.time(), UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)]), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


if __name__ == "__main__":
    main()
