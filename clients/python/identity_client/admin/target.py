"""Where a broker is administered: its Unix socket on the same machine, or mTLS from elsewhere.

- The Unix socket proves the caller by the kernel's word (SO_PEERCRED); it needs no certificate.
- Over mTLS the broker's exact SPIFFE ID is pinned, not just its trust domain.
- What can be known to be wrong before connecting (no socket there, unreadable file) is said as
  such, and never shows what a file holds.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from identity_client.admin._names import broker_server_name
from identity_client.errors import BrokerUnavailable, NotPermitted, SettingsInvalid

_MAX_PATH_BYTES = 107  # sun_path, without its final zero
# A connection that does not come back at once is reported, not waited for.
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)


class Target(Protocol):
    """A broker to administer."""

    def open(self) -> grpc.Channel:
        """Return a channel to it; nothing is sent yet.

        Raises:
            BrokerUnavailable: nothing can be listening there.
            NotPermitted: this user may not connect there.
            SettingsInvalid: a file of ours cannot be used.
        """
        ...


@dataclass(frozen=True, slots=True)
class UnixTarget:
    """The broker's admin socket on this machine."""

    path: Path

    def open(self) -> grpc.Channel:
        """Return a channel over the socket."""
        path = self.path.absolute()
        self._probe(path)
        options = (*_OPTIONS, ("grpc.default_authority", "localhost"))
        return grpc.insecure_channel(f"unix:{path}", options=options)

    def _probe(self, path: Path) -> None:
        """Connect once by hand: the kernel says why not in better words than gRPC passes on."""
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise SettingsInvalid(
                f'the socket path "{path}" is too long',
                hint=f"a Unix socket's path has at most {_MAX_PATH_BYTES} bytes; the broker can "
                "be told another one with server.admin_socket",
            )
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        probe.settimeout(2.0)
        try:
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise SettingsInvalid(f'"{path}" is not a socket')
            probe.connect(os.fspath(path))
        except PermissionError as exc:
            raise NotPermitted(
                f'this user may not use the admin socket "{path}"',
                reason="ADMIN_SOCKET_DENIED",
                hint="run it as the broker's own user, as root, or as a member of its admin group",
            ) from exc
        except OSError as exc:
            raise BrokerUnavailable(
                f'no broker listens on "{path}"',
                hint="start one (idb dev --dir DIR, or idb server run --config FILE) or name "
                "another: --dir DIR, --socket PATH",
            ) from exc
        finally:
            probe.close()


@dataclass(frozen=True, slots=True)
class MtlsTarget:
    """A broker's mTLS port, with the X.509-SVID of an entry that has the admin flag.

    `cert_file` holds the SVID's PEM chain, `key_file` its PEM key, `bundle_file` the trust
    domain's PEM bundle.
    """

    address: str
    cert_file: Path
    key_file: Path
    bundle_file: Path

    def open(self) -> grpc.Channel:
        """Return a channel that accepts the broker's own SPIFFE ID and nothing else."""
        chain = _read(self.cert_file, "certificate")
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read(self.bundle_file, "bundle"),
            private_key=_read(self.key_file, "key"),
            certificate_chain=chain,
        )
        name = broker_server_name(_trust_domain(chain, self.cert_file))
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", name))
        return grpc.secure_channel(self.address, credentials, options=options)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SettingsInvalid(
            f'the {what} file "{path}" cannot be read: {exc.strerror or "unknown reason"}',
            reason="FILE_UNREADABLE",
        ) from exc


def _trust_domain(chain: bytes, path: Path) -> str:
    from cryptography import x509  # noqa: PLC0415 - the Unix socket needs no certificate

    try:
        leaf = x509.load_pem_x509_certificate(chain)
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = san.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise SettingsInvalid(f'"{path}" does not begin with an X.509-SVID') from exc
    if len(uris) != 1 or not uris[0].startswith("spiffe://"):
        raise SettingsInvalid(f'"{path}" does not begin with an X.509-SVID')
    return uris[0].removeprefix("spiffe://").partition("/")[0]
