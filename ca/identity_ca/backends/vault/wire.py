"""One HTTP exchange with OpenBao or Vault, on hvac's adapter.

- A token travels only to the configured address and to hosts named in `redirect_hosts`; any other
  redirect is refused before a byte is sent there, and https is never left for http.
- Every exchange ends: connecting, waiting and reading share one deadline, and an answer has a
  size limit.
- One connection per thread: `requests.Session` is not documented as thread-safe.
- Nothing is read from the environment (proxies, `.netrc`, `VAULT_*`).
- Paths are taken literally: a path that HTTP software would rewrite is refused here.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from hvac.adapters import RawAdapter
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError as Urllib3Error
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError

from identity_ca.errors import BackendMisconfigured, BackendUnavailable

__all__ = [
    "Reply",
    "VaultRefused",
    "VaultSettings",
    "VaultUnavailable",
    "Wire",
    "checked_path",
]

JsonObject = Mapping[str, Any]

_MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 2
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._~+:@=-]+", re.ASCII)
_SAFE_TEXT: Final = re.compile(r"[^\x20-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultSettings:
    """Where the server is and how long to wait for it.

    Attributes:
        address: scheme, host and port; plain http is accepted for loopback addresses only.
        namespace: sent as `X-Vault-Namespace`; empty for none.
        ca_file: PEM bundle that must have signed the server's certificate; None: system roots.
        client_certificate: PEM files (certificate, key) to present, for auth method `cert`.
        timeout: seconds for one call, all its retries included.
        connect_timeout: seconds for one connection attempt.
        redirect_hosts: further `host:port` that a redirect may name (the other cluster nodes).
        open_seconds: how long calls fail at once after the server was found to be down.
    """

    address: str
    namespace: str = ""
    ca_file: Path | None = None
    client_certificate: tuple[Path, Path] | None = None
    timeout: float = 10.0
    connect_timeout: float = 2.0
    redirect_hosts: frozenset[str] = frozenset()
    open_seconds: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BackendMisconfigured(
                "the OpenBao address is not a URL",
                hint='it looks like "https://bao:8200"',
            )
        if parts.username or parts.password or parts.query or parts.path.strip("/"):
            raise BackendMisconfigured(
                "the OpenBao address is more than scheme, host and port",
                hint='it looks like "https://bao:8200"',
            )
        if parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise BackendMisconfigured(
                "plain http would send the OpenBao token readable over the network",
                hint="use an https address; http is accepted for loopback only",
            )
        if self.timeout <= 0 or self.connect_timeout <= 0:
            raise BackendMisconfigured("the OpenBao timeouts must be positive")
        missing = [
            str(path)
            for path in (self.ca_file, *(self.client_certificate or ()))
            if path is not None and not path.is_file()
        ]
        if missing:
            raise BackendMisconfigured(
                "a certificate file for OpenBao is missing", detail=", ".join(missing)
            )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, whatever the status.

    Attributes:
        status: HTTP status code.
        body: the JSON object; empty for 204, for an empty body and for anything that is no object.
        errors: the server's own sentences, shortened, for the operator.
        retry_after: seconds from the `Retry-After` header, or None.
    """

    status: int
    body: JsonObject = field(repr=False)
    errors: tuple[str, ...] = ()
    retry_after: float | None = None

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


class VaultUnavailable(BackendUnavailable):
    """No usable answer now.

    Attributes:
        status: HTTP status; None when there was no answer at all.
        sealed: the server says so itself.
        sent: the request may have reached the server and taken effect.
        transient: the kind that is often gone a moment later.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        detail: str = "",
        retry_after: float | None = 1.0,
        status: int | None = None,
        sealed: bool = False,
        sent: bool = True,
        transient: bool = False,
    ) -> None:
        super().__init__(message, hint=hint, detail=detail, retry_after=retry_after)
        self.status = status
        self.sealed = sealed
        self.sent = sent
        self.transient = transient


class VaultRefused(BackendMisconfigured):
    """An answer that will be the same next time."""

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        detail: str = "",
        status: int | None = None,
        errors: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint, detail=detail)
        self.status = status
        self.errors = errors


def checked_path(path: str) -> str:
    """The path as given, when every piece of software on the way reads it the same.

    Raises:
        BackendMisconfigured: empty, leading or trailing slash, `//`, `.`, `..`, `%`, or any
            character outside `A-Z a-z 0-9 . _ ~ + : @ = -`. requests resolves dot segments itself,
            OpenBao answers `//` with a redirect and a trailing slash with 404.
    """
    for segment in path.split("/"):
        if segment in {"", ".", ".."} or _SEGMENT.fullmatch(segment) is None:
            raise BackendMisconfigured(
                "an OpenBao path has an empty, dot or unusual segment",
                hint="check the mount, key, role and issuer names in the configuration",
                detail=repr(path[:200]),
            )
    return path


class Wire:
    """Sends one request and reads one answer; safe to use from several threads."""

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings
        self._home = _origin(settings.address)
        self._local = threading.local()
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()
        self._lock = threading.Lock()

    @property
    def settings(self) -> VaultSettings:
        """What this was built with."""
        return self._settings

    def exchange(
        self,
        method: str,
        path: str,
        *,
        deadline: float,
        body: JsonObject | None = None,
        params: Mapping[str, str] | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request and its answer, redirects to known hosts included.

        Args:
            deadline: on `time.monotonic`'s scale.
            body: sent as JSON from a copy, so that no layer below can change the caller's.

        Raises:
            VaultUnavailable: no answer in time, or the connection broke.
            VaultRefused: a redirect to an unknown host, or a TLS failure.
        """
        sent = dict(headers or {})
        if token:
            sent["X-Vault-Token"] = token
        origin, target = self._home, f"/v1/{checked_path(path)}"
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._send(
                origin,
                method,
                target,
                sent,
                json_body=body,
                params=params,
                deadline=deadline,
            )
            if response.status_code not in _REDIRECTS:
                return _read(response, deadline)
            location = response.headers.get("Location", "")
            response.close()
            origin, target = self._redirected(origin, target, location)
        raise VaultRefused("OpenBao redirects in a circle", detail=f"{method} {path}", status=307)

    def close(self) -> None:
        """Closes every thread's connections; they open again on use."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def _send(
        self,
        origin: str,
        method: str,
        target: str,
        headers: dict[str, str],
        *,
        json_body: JsonObject | None,
        params: Mapping[str, str] | None,
        deadline: float,
    ) -> requests.Response:
        left = deadline - time.monotonic()
        if left <= 0:
            raise VaultUnavailable("OpenBao did not answer in time", sent=False)
        try:
            response: requests.Response = self._adapter(origin).request(
                method,
                target,
                headers=dict(headers),
                raise_exception=False,
                json=None if json_body is None else dict(json_body),
                params=None if params is None else dict(params),
                timeout=(min(left, self._settings.connect_timeout), left),
                stream=True,
            )
        except requests.RequestException as exc:
            raise _no_answer(exc) from exc
        return response

    def _adapter(self, origin: str) -> RawAdapter:
        adapters: dict[str, RawAdapter] | None = getattr(self._local, "adapters", None)
        if adapters is None:
            adapters = self._local.adapters = {}
        adapter = adapters.get(origin)
        if adapter is None:
            adapter = adapters[origin] = RawAdapter(
                base_uri=origin,
                session=self._requests_session(),
                allow_redirects=False,
                namespace=self._settings.namespace or None,
            )
        return adapter

    def _requests_session(self) -> requests.Session:
        settings = self._settings
        session = requests.Session()
        session.trust_env = False
        session.verify = True if settings.ca_file is None else str(settings.ca_file)
        if settings.client_certificate is not None:
            certificate, key = settings.client_certificate
            session.cert = (str(certificate), str(key))
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=1, max_retries=0))
        with self._lock:
            self._sessions.add(session)
        return session

    def _redirected(self, origin: str, target: str, location: str) -> tuple[str, str]:
        """Where a redirect may lead: same request, known host, never from https to http."""
        parts = urlsplit(location)
        to = _origin(location) if parts.netloc else origin
        known = to == self._home or urlsplit(to).netloc in self._settings.redirect_hosts
        if not known or (origin.startswith("https:") and not to.startswith("https:")):
            raise VaultRefused(
                "OpenBao redirects to a host that is not configured",
                hint=f'add "{urlsplit(to).netloc}" to the redirect hosts if it is a cluster node',
                detail=f"from {origin} to {to}",
                status=307,
            )
        if parts.path != target:
            raise VaultRefused(
                "OpenBao redirects to another path",
                hint="check the mount, key, role and issuer names in the configuration",
                detail=f"from {target} to {parts.path[:200]!r}",
                status=307,
            )
        return to, target


def _read(response: requests.Response, deadline: float) -> Reply:
    chunks: list[bytes] = []
    size = 0
    try:
        # read1, not iter_content: that waits for a full chunk, so that an answer which drips in
        # byte by byte would hold the caller for as long as it likes.
        while chunk := response.raw.read1(64 * 1024, decode_content=True):
            chunks.append(chunk)
            size += len(chunk)
            if size > _MAX_ANSWER_BYTES:
                raise VaultRefused("an answer of OpenBao is too large", status=response.status_code)
            if time.monotonic() > deadline:
                raise VaultUnavailable("OpenBao did not answer in time")
        response.raw.read()  # marks the answer as read to its end: the connection is used again
    except Urllib3TimeoutError as exc:
        raise VaultUnavailable("OpenBao did not answer in time") from exc
    except (Urllib3Error, OSError) as exc:
        raise VaultUnavailable(
            "the connection to OpenBao broke", detail=type(exc).__name__, transient=True
        ) from exc
    finally:
        # Keeps the connection when the body was read to its end, drops it otherwise.
        response.close()
    body = _json_object(b"".join(chunks))
    return Reply(
        status=response.status_code,
        body=body,
        errors=_errors(body),
        retry_after=_seconds(response.headers.get("Retry-After")),
    )


def _json_object(text: bytes) -> JsonObject:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _errors(body: JsonObject) -> tuple[str, ...]:
    found = body.get("errors")
    if not isinstance(found, list):
        return ()
    return tuple(_SAFE_TEXT.sub(" ", str(line))[:300].strip() for line in found[:5])


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds; the date form is not used by OpenBao and counts as absent."""
    if header is None or re.fullmatch(r"[0-9]{1,6}", header.strip(), re.ASCII) is None:
        return None
    return float(header)


def _no_answer(exc: requests.RequestException) -> VaultUnavailable | VaultRefused:
    # The request object carries the token; nobody who logs the chain of causes may find it there.
    exc.request = None
    exc.response = None
    detail = type(exc).__name__
    if isinstance(exc, requests.exceptions.SSLError):
        return VaultRefused(
            "the TLS connection to OpenBao failed",
            hint="check the CA file and the host name in the address",
            detail=f"{detail}: {_SAFE_TEXT.sub(' ', str(exc))[:300]}",
        )
    if isinstance(exc, requests.exceptions.ConnectTimeout):
        return VaultUnavailable("OpenBao cannot be reached", detail=detail, sent=False)
    if isinstance(exc, requests.exceptions.Timeout):
        return VaultUnavailable("OpenBao did not answer in time", detail=detail)
    if isinstance(exc, requests.exceptions.ConnectionError) and "NewConnectionError" in str(exc):
        return VaultUnavailable(
            "OpenBao cannot be reached", detail=detail, sent=False, transient=True
        )
    return VaultUnavailable("the connection to OpenBao broke", detail=detail, transient=True)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
