"""Two services that know SPIFFE libraries alone: tls_service.py server|client …, one process each.

    server CLIENT_ID           mTLS by spiffe-tls; a line with its port, then one for every peer
    client PORT SERVER_ID      on every line of input a connection; a line for what came of it

Their identities come from SPIFFE_ENDPOINT_SOCKET.
"""

from __future__ import annotations

import json
import socket
import sys
import warnings
from typing import Any

from OpenSSL import SSL
from spiffe import SpiffeId, X509Source
from spiffetls import dial
from spiffetls.context import create_ssl_context
from spiffetls.errors import TLSConnectionError
from spiffetls.tlsconfig.authorize import authorize_id

# spiffe-tls asks its own library in a way that library has since given up.
warnings.filterwarnings("ignore", category=DeprecationWarning)


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


def shown(connection: SSL.Connection) -> dict[str, object]:
    """Which certificate the other side showed."""
    certificate = connection.get_peer_certificate()
    assert certificate is not None
    return {"serial": f"{certificate.get_serial_number():040x}"}


def server(client_id: str) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    with X509Source(timeout_in_seconds=20) as source:
        say(port=listening.getsockname()[1])
        while True:
            accepted, _ = listening.accept()
            # A context for every connection: spiffetls.listen makes one, and pyOpenSSL lets nobody
            # put a rotated certificate into a context that was used.
            context = create_ssl_context(
                SSL.TLS_SERVER_METHOD, source, authorize_id(SpiffeId(client_id))
            )
            connection = SSL.Connection(context, accepted)
            connection.set_accept_state()
            try:
                connection.do_handshake()
                connection.sendall(b"hello " + connection.recv(100))
                say(**shown(connection))
                connection.shutdown()
            except SSL.Error:
                say(refused=True)
            finally:
                connection.close()


def client(port: str, server_id: str) -> None:
    with X509Source(timeout_in_seconds=20) as source:
        say(id=str(source.get_x509_context().default_svid.spiffe_id))
        for line in sys.stdin:
            try:
                connection = dial(
                    f"127.0.0.1:{port}", source, authorize_fn=authorize_id(SpiffeId(server_id))
                )
                connection.sendall(line.strip().encode())
                say(answer=connection.recv(100).decode(), **shown(connection))
                connection.close()
            except (SSL.Error, TLSConnectionError):
                say(refused=True)


if __name__ == "__main__":
    act: Any = {"server": server, "client": client}[sys.argv[1]]
    act(*sys.argv[2:])
