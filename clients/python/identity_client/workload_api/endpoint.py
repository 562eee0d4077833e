"""Where a Workload API is: `unix:///run/agent/api.sock` or `tcp://127.0.0.1:8000`, and no more.

- SPIFFE Workload Endpoint, section 4: a `unix` URI has an absolute path and nothing else, a `tcp`
  URI an IP address and a port and nothing else. Whatever else is written is refused, not ignored:
  a query or a host name that has no effect would hide a mistake.
- A host name is refused because whoever answers for it would be trusted with everything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit

from identity_client._wire.workload import ENDPOINT_VARIABLE
from identity_client.errors import SettingsInvalid

__all__ = ["Endpoint"]

_FORMS = "unix:///absolute/path or tcp://IP:PORT"
_PATH_LIMIT = 107  # sun_path of struct sockaddr_un, without the closing zero: unix(7)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a Workload API.

    Attributes:
        uri: as it was written.
        target: the same for gRPC.
    """

    uri: str
    target: str = field(repr=False)

    def __str__(self) -> str:
        return self.uri

    @classmethod
    def parse(cls, uri: str) -> Endpoint:
        """The endpoint that `uri` names.

        Raises:
            SettingsInvalid: reason ENDPOINT_INVALID (SPIFFE Workload Endpoint, section 4).
        """
        if not uri.isascii() or not uri.isprintable() or " " in uri:
            raise _refused(uri, "it holds characters that no URI can hold")
        if "?" in uri or "#" in uri:
            raise _refused(uri, "it must have no query and no fragment")
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise _refused(uri, f"it must be {_FORMS}") from None
        match parts.scheme:
            case "unix":
                return cls(uri, _unix_target(uri, parts))
            case "tcp":
                return cls(uri, _tcp_target(uri, parts))
            case _:
                raise _refused(uri, f"it must be {_FORMS}")

    @classmethod
    def named(cls, uri: str | None, env: Mapping[str, str]) -> Endpoint:
        """The endpoint that was given, else that of SPIFFE_ENDPOINT_SOCKET.

        Raises:
            SettingsInvalid: there is neither, or it names no endpoint.
        """
        if uri is None:
            uri = env.get(ENDPOINT_VARIABLE, "")
            if not uri:
                raise SettingsInvalid(
                    f"no Workload API is named, and {ENDPOINT_VARIABLE} is not set",
                    reason="ENDPOINT_MISSING",
                    hint=f"{ENDPOINT_VARIABLE}=unix:///path/to/the/agent's/socket",
                )
        return cls.parse(uri)


def _unix_target(uri: str, parts: SplitResult) -> str:
    if parts.netloc:
        raise _refused(uri, "a unix address has no host; it has three slashes: unix:///path")
    path = unquote_to_bytes(parts.path)
    if not path.startswith(b"/") or path == b"/":
        raise _refused(uri, "a unix address needs the absolute path of a socket")
    if b"\0" in path:
        raise _refused(uri, "its path holds a zero byte")
    if len(path) > _PATH_LIMIT:
        raise _refused(uri, f"its path is longer than {_PATH_LIMIT} bytes, as long as one may be")
    return f"unix:{quote(path)}"


def _tcp_target(uri: str, parts: SplitResult) -> str:
    if parts.path or "@" in parts.netloc or not parts.netloc:
        raise _refused(uri, "a tcp address is an IP address and a port and nothing else")
    try:
        host, port = ipaddress.ip_address(parts.hostname or ""), parts.port
    except ValueError:
        raise _refused(uri, "a tcp address needs an IP address and a port") from None
    if not port:
        raise _refused(uri, "a tcp address needs a port")
    return f"ipv4:{host}:{port}" if host.version == 4 else f"ipv6:[{host}]:{port}"


def _refused(uri: str, why: str) -> SettingsInvalid:
    return SettingsInvalid(
        f'"{uri[:200]!s}" is not the address of a Workload API: {why}',
        reason="ENDPOINT_INVALID",
        hint=f"write {_FORMS}",
    )
