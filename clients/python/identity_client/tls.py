"""`ssl.SSLContext`s that follow rotation and refuse the wrong peer in the handshake.

    context = client_ssl_context(source, authorize="spiffe://example.org/api")
    http.client.HTTPSConnection("api.internal", 8443, context=context)

    context = server_ssl_context(source, authorize=below("spiffe://example.org/web"))
    await asyncio.start_server(serve, port=8443, ssl=context)

    server = http.server.ThreadingHTTPServer(("", 8443), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True,
                                        do_handshake_on_connect=False)

    config = uvicorn.Config(app, port=8443); config.load(); config.ssl = context

- A connection is made with the newest snapshot, whole: one `SSLContext` is built per snapshot and
  never changed, so no handshake sees one generation's chain with another's key, and a root that
  left the bundle is gone for new connections.
- Verification cannot be switched off: the mode and roots of the context handed out decide
  nothing. Both sides present certificates, TLS 1.3 only, no session tickets.
- Names: SPIFFE IDs are checked and host names are not (X509-SVID section 5). For libraries that
  compare host names on their own, say so: urllib3 `assert_hostname=False`.
- The peer is checked when the handshake ends, before a byte is read or written, also when the
  handshake is left to the first read; and again at every read and write.
- The connections of a peer that is revoked are ended at once, also one that waits for its peer:
  sockets (and with them keep-alive connections of HTTP servers, clients and pools) and asyncio's
  transports; `identity_client.open_connections` says how.
- The private key reaches OpenSSL through a memory file that only this process can open.
"""

from __future__ import annotations

import os
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from spiffe import SpiffeId

from identity_client.authorization import Authorize, PeerRule, check_allowed, peer_rule
from identity_client.credential import IdentitySnapshot
from identity_client.errors import PeerRejected, SourceError
from identity_client.open_connections import OpenConnections
from identity_client.peer import Peer, check_current, is_refused, peer_from_der
from identity_client.revocation import DenySet
from identity_client.staleness import StalenessPolicy

__all__ = [
    "PeerRefusedInHandshake",
    "SnapshotSource",
    "client_ssl_context",
    "peer_spiffe_id",
    "server_ssl_context",
    "verify_peer",
]


class SnapshotSource(Protocol):
    """What the integrations need of a source: sync, asyncio and fake ones have it."""

    def snapshot(self) -> IdentitySnapshot:
        """The current identity; raises SourceError."""
        ...

    @property
    def denied(self) -> DenySet:
        """What was revoked."""
        ...


class PeerRefusedInHandshake(PeerRejected, ssl.SSLCertVerificationError):
    """A peer was refused; an `ssl.SSLError` too, so that TLS servers and clients survive it."""


class _NoIdentityForHandshake(SourceError, ssl.SSLError):
    """We have no identity to show; an `ssl.SSLError` too, so that a server's accept survives it."""


def client_ssl_context(
    source: SnapshotSource, *, authorize: Authorize, staleness: StalenessPolicy | None = None
) -> ssl.SSLContext:
    """A context for clients: shows our X.509-SVID, accepts servers that `authorize` names.

    Args:
        source: whose identity to show and whose bundle to trust.
        authorize: the servers' SPIFFE IDs, or a rule; host names play no part.
        staleness: what silence about revocations means here; None for the source's policy.

    Raises:
        SettingsInvalid: a SPIFFE ID in `authorize` is not one.
    """
    return RotatingContext.around(
        source, peer_rule(authorize), server_side=False, staleness=staleness
    )


def server_ssl_context(
    source: SnapshotSource, *, authorize: Authorize, staleness: StalenessPolicy | None = None
) -> ssl.SSLContext:
    """A context for servers: shows our X.509-SVID, accepts clients that `authorize` names.

    Args:
        source: whose identity to show and whose bundle to trust.
        authorize: the clients' SPIFFE IDs, or a rule. Every client needs an X.509-SVID.
        staleness: what silence about revocations means here; None for the source's policy.

    Raises:
        SettingsInvalid: a SPIFFE ID in `authorize` is not one.
    """
    return RotatingContext.around(
        source, peer_rule(authorize), server_side=True, staleness=staleness
    )


def peer_spiffe_id(connection: ssl.SSLSocket | ssl.SSLObject) -> SpiffeId:
    """The SPIFFE ID of the peer of an established connection made by a context from here.

    For asyncio: `writer.get_extra_info("ssl_object")`.

    Raises:
        PeerRejected: the peer showed no X.509-SVID.
    """
    return _peer_of(connection).spiffe_id


def verify_peer(
    connection: ssl.SSLSocket | ssl.SSLObject, *, source: SnapshotSource, authorize: Authorize
) -> SpiffeId:
    """Checks the peer of an established connection once more: name, revocation, expiry.

    The contexts from here do this by themselves; it is for stricter rules on single requests.

    Raises:
        PeerRejected: PEER_REJECTED, PEER_REVOKED, PEER_EXPIRED or REVOCATIONS_STALE.
        SourceError: we have no identity ourselves any more.
    """
    peer = _peer_of(connection)
    check_allowed(peer, peer_rule(authorize), bundle=source.snapshot().bundle)
    check_current(peer, source.denied)
    return peer.spiffe_id


class RotatingContext(ssl.SSLContext):
    """Hands every new connection to the context of the newest snapshot."""

    _source: SnapshotSource
    _rule: PeerRule
    server_side: bool
    alpn: list[str] | None
    _generation: _Generation | None
    _building: threading.Lock
    _staleness: StalenessPolicy | None
    _open: OpenConnections

    @classmethod
    def around(
        cls,
        source: SnapshotSource,
        rule: PeerRule,
        *,
        server_side: bool,
        staleness: StalenessPolicy | None = None,
    ) -> Self:
        """A context for connections with `source`'s identity to peers that `rule` accepts."""
        protocol = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        context = cls(protocol)
        context._source, context._rule, context.server_side = source, rule, server_side
        context.alpn, context._generation = None, None
        context._building = threading.Lock()
        context._staleness, context._open = staleness, OpenConnections()
        source.denied.watch(context)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def set_alpn_protocols(self, alpn_protocols: Any) -> None:
        """Remembered for every generation, the current one included."""
        with self._building:
            self.alpn, self._generation = list(alpn_protocols), None

    def wrap_socket(
        self,
        sock: Any,
        server_side: bool = False,  # noqa: FBT001, FBT002 - the standard library's signature
        do_handshake_on_connect: bool = True,  # noqa: FBT001, FBT002
        suppress_ragged_eofs: bool = True,  # noqa: FBT001, FBT002
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        return self._newest().wrap_socket(
            sock,
            server_side=server_side,
            do_handshake_on_connect=do_handshake_on_connect,
            suppress_ragged_eofs=suppress_ragged_eofs,
            server_hostname=server_hostname,
        )

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return self._newest().wrap_bio(
            incoming, outgoing, server_side=server_side, server_hostname=server_hostname
        )

    def check(self, connection: ssl.SSLSocket | ssl.SSLObject) -> Peer:
        """The peer, once name, revocation and expiry were checked.

        Raises:
            PeerRefusedInHandshake.
        """
        try:
            peer = _peer_of(connection)
            check_allowed(peer, self._rule, bundle=_generation(connection.context).snapshot.bundle)
        except PeerRejected as refusal:
            raise PeerRefusedInHandshake.because(refusal) from refusal
        self.recheck(peer)
        return peer

    def recheck(self, peer: Peer) -> None:
        """Revocation and expiry of a peer on an open connection.

        Raises:
            PeerRefusedInHandshake.
        """
        try:
            check_current(peer, self._source.denied, staleness=self._staleness)
        except PeerRejected as refusal:
            raise PeerRefusedInHandshake.because(refusal) from refusal

    def admit_socket(self, connection: ssl.SSLSocket) -> Peer:
        """As `check`; from now on the connection ends with its peer's revocation."""
        peer = self.check(connection)
        self._open.add_socket(connection, peer)
        self.recheck(peer)  # It may have been revoked before the connection was known.
        return peer

    def admit_object(self, connection: ssl.SSLObject) -> Peer:
        """As `admit_socket`."""
        peer = self.check(connection)
        self._open.add_object(connection, peer)
        self.recheck(peer)
        return peer

    def peers_denied(self) -> None:
        """Ends the connections of whoever is revoked."""
        denied = self._source.denied
        self._open.close_those(lambda peer: is_refused(peer, denied))

    def _newest(self) -> _Generation:
        try:
            snapshot = self._source.snapshot()
        except SourceError as error:
            raise _NoIdentityForHandshake.because(error) from error
        generation = self._generation
        if generation is not None and generation.snapshot is snapshot:
            return generation
        with self._building:
            if self._generation is None or self._generation.snapshot is not snapshot:
                self._generation = _Generation.of(self, snapshot)
            return self._generation


class _Generation(ssl.SSLContext):
    """The context of one snapshot; never changed after it was built."""

    rotating: RotatingContext
    snapshot: IdentitySnapshot

    @classmethod
    def of(cls, rotating: RotatingContext, snapshot: IdentitySnapshot) -> _Generation:
        server_side = rotating.server_side
        context = cls(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.rotating, context.snapshot = rotating, snapshot
        context.sslsocket_class, context.sslobject_class = _CheckedSocket, _CheckedObject
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        # An authority need not be self-signed to be one (X509-SVID section 5.1).
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if server_side:
            context.num_tickets = 0  # A resumed session would show a certificate of the past.
        context.load_verify_locations(cadata=snapshot.bundle.roots_pem.decode("ascii"))
        with _private_file(snapshot.x509.chain_pem + snapshot.x509.key_pem) as path:
            context.load_cert_chain(path)
        if rotating.alpn is not None:
            context.set_alpn_protocols(rotating.alpn)
        return context


class _CheckedSocket(ssl.SSLSocket):
    """A socket that passes nothing before its peer was checked nor after it was revoked."""

    do_handshake_on_connect: bool  # set by the base class, and unknown to its stubs
    suppress_ragged_eofs: bool
    _checked_peer: Peer | None = None

    @property
    def _rotating(self) -> RotatingContext:
        return _generation(self.context).rotating

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002
        super().do_handshake(block)
        self._checked_peer = self._rotating.admit_socket(self)

    def accept(self) -> tuple[ssl.SSLSocket, Any]:
        # A listening socket lives longer than the generation it was wrapped with.
        plain, address = super(ssl.SSLSocket, self).accept()
        try:
            connection = self._rotating.wrap_socket(
                plain,
                server_side=True,
                do_handshake_on_connect=self.do_handshake_on_connect,
                suppress_ragged_eofs=self.suppress_ragged_eofs,
            )
        except BaseException:
            plain.close()
            raise
        return connection, address

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        self._ensure_checked()
        try:
            received = super().read(len, buffer)
        except OSError:
            self._recheck()  # It may have been shut down because its peer is revoked.
            raise
        self._recheck()
        return received

    def write(self, data: Any) -> int:
        self._ensure_checked()
        self._recheck()
        try:
            return super().write(data)
        except OSError:
            self._recheck()
            raise

    def send(self, data: Any, flags: int = 0) -> int:
        self._ensure_checked()
        self._recheck()
        try:
            return super().send(data, flags)
        except OSError:
            self._recheck()
            raise

    def _ensure_checked(self) -> None:
        if self._checked_peer is None and self._sslobj is not None:  # type: ignore[attr-defined]
            self.do_handshake()

    def _recheck(self) -> None:
        if self._checked_peer is not None:
            self._rotating.recheck(self._checked_peer)


class _CheckedObject(ssl.SSLObject):
    """The same for memory BIOs: what asyncio uses."""

    _checked_peer: Peer | None = None

    @property
    def _rotating(self) -> RotatingContext:
        return _generation(self.context).rotating

    def do_handshake(self) -> None:
        super().do_handshake()
        self._checked_peer = self._rotating.admit_object(self)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        peer = self._checked()
        try:
            received = super().read(len, buffer)
        except ssl.SSLError:
            self._rotating.recheck(peer)  # Nothing is there: it may have been asked for that.
            raise
        self._rotating.recheck(peer)
        return received

    def write(self, data: Any) -> int:
        self._rotating.recheck(self._checked())
        return super().write(data)

    def _checked(self) -> Peer:
        if self._checked_peer is None:
            self.do_handshake()
        return self._checked_peer or self._rotating.check(self)


def _generation(context: ssl.SSLContext) -> _Generation:
    if not isinstance(context, _Generation):
        raise PeerRefusedInHandshake("the connection's context was replaced")
    return context


def _peer_of(connection: ssl.SSLSocket | ssl.SSLObject) -> Peer:
    der = connection.getpeercert(binary_form=True)
    if not der:
        raise PeerRejected("the peer showed no certificate")
    return peer_from_der(der)


@contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """A path OpenSSL can read `content` from, for the length of the block, and nobody else can."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, content)
            os.fchmod(descriptor, 0o600)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory() as directory:  # 0700
        path = Path(directory) / "identity.pem"
        path.touch(0o600)
        path.write_bytes(content)
        yield str(path)
