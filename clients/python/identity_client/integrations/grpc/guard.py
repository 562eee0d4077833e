"""Which certificates the server of a channel may show, while one that it may have is revoked.

- grpcio does not show a client the server's certificate. As long as nothing that is denied can be
  an X.509-SVID of the pinned identity, the bundle decides. Once something can (one of its own by
  name, an authority, or, where there is no feed, any entry of a list), connections to this server
  are cut, and it is looked at with a TLS handshake of our own: a revoked certificate is refused; a
  good one becomes the only root of the next connection, so that gRPC itself accepts that
  certificate and no other until what is revoked has expired. Such a connection is cut when the
  certificate it was made for is revoked, and for nothing else.
- Silence about revocations ends no call; no other begins where the policy is to refuse.
- Every address of the target is looked at. A server that shows another certificate later (it was
  renewed, or is another of several) fails one call, and is looked at again for the next.
- A target that cannot be looked at (`xds:` and the like) is refused for that time.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import unquote

import grpc

from identity_client._wire.status import refusal_status
from identity_client.errors import (
    IdentityError,
    PeerRejected,
    PeerRevoked,
    RevocationsStale,
    SourceError,
)
from identity_client.peer import Peer, is_refused, peer_from_der
from identity_client.rotation import Generation, Pins
from identity_client.staleness import StalenessPolicy
from identity_client.tls import SnapshotSource, client_ssl_context

__all__ = [
    "UNSETTLED",
    "ServerGuard",
    "ServerRejected",
    "ServerRevoked",
    "ServerStale",
    "ServerUnreachable",
    "Unsettled",
]

_CONNECT_SECONDS: Final = 3.0
_MOST_ADDRESSES: Final = 16
_MOST_PINS: Final = 64
# Calls that come one after another while a server is refused share one look at it.
_LOOK_AGAIN_SECONDS: Final = 0.2
_HTTPS: Final = 443

_Address = tuple[socket.AddressFamily, Any]


class _RefusedCall(IdentityError, grpc.RpcError):
    """A call that was not made, for whoever expects `grpc.RpcError`."""

    def code(self) -> grpc.StatusCode:
        return refusal_status(self).code

    def details(self) -> str:
        return self.message

    def trailing_metadata(self) -> Any:
        return refusal_status(self).trailing_metadata


class ServerRevoked(PeerRevoked, _RefusedCall):
    """The server shows a revoked certificate, or did when the call was cut."""


class ServerRejected(PeerRejected, _RefusedCall):
    """The server shows a certificate that is not accepted, or it cannot be looked at."""


class ServerStale(RevocationsStale, _RefusedCall):
    """Nothing was heard about revocations for too long to call anybody."""


class ServerUnreachable(_RefusedCall):
    """The server does not answer, so that nobody can say what it shows."""

    default_reason = "SERVER_UNREACHABLE"
    sentence = "the server does not answer, and its certificate must be looked at"


class Unsettled:
    """The server must be looked at first."""


UNSETTLED: Final = Unsettled()


class ServerGuard:
    """Watches over the server of one channel. Any thread may use it.

    Args:
        source: whose identity to show and whose revocations to follow.
        peer: the SPIFFE ID the server must have.
        target: as gRPC takes it.
        cut: ends the generations that a test picks; called on the source's thread.
        staleness: what silence about revocations means here; None for the source's policy.
    """

    def __init__(
        self,
        source: SnapshotSource,
        peer: str,
        target: str,
        cut: Callable[[Callable[[Generation[Any]], bool], ServerRevoked], None],
        staleness: StalenessPolicy | None = None,
    ) -> None:
        self._staleness = staleness
        self._source = source
        self._peer = peer
        self._target = target
        self._cut = cut
        self._lock = threading.Lock()
        self._good: dict[bytes, Peer] = {}
        self._pins: Pins | None = None
        self._version = 0
        self._doubted = False
        self._refusal: tuple[float, _RefusedCall] | None = None
        source.denied.watch(self)

    def pins(self) -> Pins | None:
        """What the server may show; None for whatever the bundle vouches for. May block.

        Raises:
            ServerRevoked, ServerRejected, ServerUnreachable: no connection may be made.
            ServerStale: nobody can say.
            SourceError: we have no identity to look at it with.
        """
        try:
            self._source.denied.check_fresh(self._staleness)
        except RevocationsStale as stale:
            raise ServerStale.because(stale) from stale
        known = self.known()
        if not isinstance(known, Unsettled):
            return known
        with self._lock:
            known = self.known()  # Somebody else may have looked.
            if not isinstance(known, Unsettled):
                return known
            if self._refusal is not None and time.monotonic() < self._refusal[0]:
                raise self._refusal[1]
            self._look()
            return self._pins

    def known(self) -> Pins | Unsettled | None:
        """As `pins`, without blocking; whatever is refused is unsettled."""
        denied = self._source.denied
        try:
            denied.check_fresh(self._staleness)
        except RevocationsStale:
            return UNSETTLED
        if not denied.may_concern(self._peer):
            self._pins = None
            return None
        pins = self._pins
        if pins is None or self._doubted or any(map(self._is_over, pins.peers)):
            return UNSETTLED
        return pins

    def doubt(self, generation: Generation[Any]) -> None:
        """A call could not reach the server: it may show another certificate by now."""
        if generation.pins is not None and generation.pins is self._pins:
            self._doubted = True

    def peers_denied(self) -> None:
        """Ends connections to whom is revoked; see `identity_client.revocation.Watcher`."""
        if self._source.denied.may_concern(self._peer):
            self._cut(self._is_doomed, _revoked(self._peer))

    def _is_doomed(self, generation: Generation[Any]) -> bool:
        pins = generation.pins
        return pins is None or any(map(self._is_denied, pins.peers))

    def _is_denied(self, peer: Peer) -> bool:
        return is_refused(peer, self._source.denied)

    def _is_over(self, peer: Peer) -> bool:
        return self._is_denied(peer) or time.time() >= peer.expires_at

    def _look(self) -> None:
        self._doubted = False
        self._good = {der: peer for der, peer in self._good.items() if not self._is_over(peer)}
        failure: _RefusedCall | None = None
        seen = False
        for address in _addresses(self._target):
            try:
                der = self._shown_at(address)
            except RevocationsStale as stale:
                raise ServerStale.because(stale) from stale
            except PeerRejected as refusal:
                rejected = isinstance(refusal, PeerRevoked) or refusal.reason == "PEER_REVOKED"
                failure = (ServerRevoked if rejected else ServerRejected).because(refusal)
            except SourceError:
                raise
            except ssl.SSLCertVerificationError as exc:
                failure = failure or ServerRejected(
                    f"the server's certificate does not verify: {exc.verify_message}"
                )
            except OSError as exc:
                failure = failure or ServerUnreachable(
                    f"{ServerUnreachable.sentence}: {exc.strerror or type(exc).__name__}"
                )
            else:
                seen = True
                self._good[der] = peer_from_der(der)
        if not seen:
            # What was good before may be elsewhere by now: whoever answers here decides.
            self._refusal = (
                time.monotonic() + _LOOK_AGAIN_SECONDS,
                failure or _unlookable(self._target),
            )
            self._pins = None
            raise self._refusal[1]
        while len(self._good) > _MOST_PINS:
            del self._good[next(iter(self._good))]
        peers = tuple(self._good.values())
        if self._pins is not None and self._pins.peers == peers:
            return
        self._version += 1
        self._pins = Pins(
            version=self._version,
            peers=peers,
            pem="".join(map(ssl.DER_cert_to_PEM_cert, self._good)).encode("ascii"),
        )

    def _shown_at(self, address: _Address) -> bytes:
        context = client_ssl_context(self._source, authorize=self._peer, staleness=self._staleness)
        context.set_alpn_protocols(["h2"])
        family, where = address
        with socket.socket(family, socket.SOCK_STREAM) as plain:
            plain.settimeout(_CONNECT_SECONDS)
            plain.connect(where)
            with context.wrap_socket(plain) as connection:
                return connection.getpeercert(binary_form=True) or b""


def _addresses(target: str) -> Iterator[_Address]:
    """Where gRPC would connect to; see grpc/doc/naming.md.

    Raises:
        ServerRejected: it cannot be said.
        OSError: the name cannot be resolved.
    """
    scheme, separator, rest = target.partition(":")
    match scheme if separator else "":
        case "unix":
            path = rest.removeprefix("//") if rest.startswith("///") else rest
            yield socket.AF_UNIX, unquote(path)
            return
        case "unix-abstract":
            yield socket.AF_UNIX, f"\0{unquote(rest)}"
            return
        case "ipv4" | "ipv6":
            names = rest.split(",")
        case "dns" | "passthrough":
            names = [rest.rpartition("/")[2]]
        case _ if rest.startswith("//"):
            raise _unlookable(target)
        case _:
            names = [target]
    found: dict[_Address, None] = {}
    for name in names:
        host, port = _host_and_port(name, target)
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as exc:
            raise ServerUnreachable(f'the name "{host}" cannot be resolved') from exc
        found |= {(family, where): None for family, _, _, _, where in answers}
    yield from list(found)[:_MOST_ADDRESSES]


def _host_and_port(name: str, target: str) -> tuple[str, int]:
    host, separator, port = name.rpartition(":")
    if not separator or name.endswith("]"):
        host, port = name, str(_HTTPS)
    if not port.isdecimal() or not host:
        raise _unlookable(target)
    return unquote(host).removeprefix("[").removesuffix("]"), int(port)


def _unlookable(target: str) -> ServerRejected:
    return ServerRejected(
        f'what was revoked may be what the server shows, and "{target[:200]}" cannot be looked at',
        reason="SERVER_UNSEEN",
        hint="use a dns:, ipv4:, ipv6: or unix: target, or wait until what is revoked has expired",
    )


def _revoked(peer: str) -> ServerRevoked:
    return ServerRevoked(f'what was revoked while the call ran may be the SVID of "{peer}"')
