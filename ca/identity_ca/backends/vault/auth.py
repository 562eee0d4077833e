"""How the broker logs in to OpenBao, and keeps its token alive.

- A token is renewed at two thirds of its life, with jitter, in a background thread; when renewal
  no longer makes it longer (its maximum is near), or cannot (batch tokens), there is a new login.
- The `lease_duration` of the reply counts, never `lookup-self`, which standbys answer stale.
- The old token stays in use until the new one is there.
- Secrets are read when they are needed (projected tokens rotate), never shown by `repr`, and never
  part of a message.
- A wrapped secret-id is unwrapped once. A wrapping token that does not unwrap, or that wraps
  something else, has been touched by somebody: that is reported as a compromise, not retried.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import SystemRandom
from typing import Any, Final, Protocol

from identity_ca.backends.vault.wire import JsonObject, VaultRefused, VaultUnavailable
from identity_ca.errors import BackendMisconfigured, CAError

__all__ = [
    "AppRoleAuth",
    "AuthMethod",
    "ClientCertificateAuth",
    "KubernetesAuth",
    "Lease",
    "TokenAuth",
    "TokenKeeper",
    "WrappedSecretCompromised",
]

_logger = logging.getLogger(__name__)
_random = SystemRandom()

_RENEW_AT: Final = 2 / 3
_JITTER: Final = 0.1
_STILL_GROWING: Final = 0.9
_RETRY_SECONDS: Final = 5.0
_FAILED_LOGIN_SECONDS: Final = 1.0
_LOGIN_STATUSES: Final = frozenset({400, 401, 403, 404, 405})
_MAX_SECRET_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Lease:
    """A token and how long it lasts.

    Attributes:
        token: never shown.
        duration: seconds from the moment it was granted; 0 for one that never ends.
        renewable: whether `renew-self` can make it longer.
        owned: whether this process logged in for it, and so may revoke it at the end.
    """

    token: str = field(repr=False)
    duration: float
    renewable: bool
    owned: bool = True


class Ask(Protocol):
    """A call outside the session's own token: login, renewal, unwrapping."""

    def __call__(
        self,
        method: str,
        path: str,
        body: JsonObject | None,
        token: str | None,
        *,
        repeat: bool = True,
        timeout: float | None = None,
    ) -> JsonObject: ...


class AuthMethod(Protocol):
    """One way to get a token."""

    @property
    def name(self) -> str: ...

    def login(self, ask: Ask) -> Lease:
        """A new token.

        Raises:
            BackendUnavailable, BackendMisconfigured
        """
        ...


class WrappedSecretCompromised(BackendMisconfigured):
    """The wrapped secret-id was unwrapped by somebody else, or is not what it must be."""


@dataclass(frozen=True, slots=True)
class TokenAuth:
    """A token that somebody else made and placed in a file (read again at each login).

    It is renewed where it can be, and left alone at the end: it is not ours to revoke.
    """

    token_file: Path

    @property
    def name(self) -> str:
        return "token"

    def login(self, ask: Ask) -> Lease:
        """See `AuthMethod.login`; asks `lookup-self` for the time left."""
        token = _read_secret(self.token_file, "token")
        try:
            answer = ask("GET", "auth/token/lookup-self", None, token)
        except VaultRefused as exc:
            raise _login_refused(self.name, exc, "put a valid token into the file") from exc
        found = answer.get("data") or {}
        # The time left is cut to whole seconds: 0 is a token about to end, unless it never ends.
        ends = found.get("expire_time") is not None
        return Lease(
            token=token,
            duration=max(float(found.get("ttl") or 0), 0.5) if ends else 0.0,
            renewable=bool(found.get("renewable")),
            owned=False,
        )


class AppRoleAuth:
    """AppRole: a role-id, and a secret-id from a 0600 file or from a wrapping token.

    Args:
        role_id: not a secret.
        secret_id_file: read at each login.
        wrapped_secret_id_file: holds a wrapping token; unwrapped at the first login, after which
            the secret-id lives in this process only.
        mount: where the auth method is mounted.
    """

    def __init__(
        self,
        role_id: str,
        *,
        secret_id_file: Path | None = None,
        wrapped_secret_id_file: Path | None = None,
        mount: str = "approle",
    ) -> None:
        file = secret_id_file or wrapped_secret_id_file
        if file is None or (secret_id_file and wrapped_secret_id_file):
            raise BackendMisconfigured(
                "AppRole needs a secret-id file or a wrapped secret-id file, and not both"
            )
        self._role_id = role_id
        self._file = file
        self._is_wrapped = secret_id_file is None
        self._mount = mount
        self._unwrapped: str | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return "approle"

    def login(self, ask: Ask) -> Lease:
        """See `AuthMethod.login`.

        Raises:
            WrappedSecretCompromised: the wrapping token does not unwrap to a secret-id.
        """
        body = {"role_id": self._role_id, "secret_id": self._secret_id(ask)}
        try:
            answer = ask("POST", f"auth/{self._mount}/login", body, None)
        except VaultRefused as exc:
            raise _login_refused(
                self.name, exc, "check the role-id, or provision a new secret-id"
            ) from exc
        return _lease(self.name, answer)

    def _secret_id(self, ask: Ask) -> str:
        if not self._is_wrapped:
            return _read_secret(self._file, "secret-id")
        with self._lock:
            if self._unwrapped is None:
                self._unwrapped = self._unwrap(ask)
            return self._unwrapped

    def _unwrap(self, ask: Ask) -> str:
        wrapping = _read_secret(self._file, "wrapped secret-id")
        try:
            found = ask("POST", "sys/wrapping/lookup", {"token": wrapping}, None)
        except VaultRefused as exc:
            raise _compromised("it has been unwrapped before, or has expired") from exc
        # Somebody who swaps the file can wrap anything; only AppRole itself can set this path.
        made_by = str((found.get("data") or {}).get("creation_path", ""))
        pattern = rf"auth/{re.escape(self._mount)}/role/[^/]+/secret-id"
        if re.fullmatch(pattern, made_by) is None:
            raise _compromised(f"it was not made by AppRole but by {made_by[:100]!r}")
        try:
            # Never repeated: after a broken connection a second try would look like a theft.
            answer = ask("POST", "sys/wrapping/unwrap", {}, wrapping, repeat=False)
        except VaultRefused as exc:
            raise _compromised("it was unwrapped by somebody else just now") from exc
        secret_id = (answer.get("data") or {}).get("secret_id")
        if not isinstance(secret_id, str) or not secret_id:
            raise _compromised("what it wraps is no secret-id")
        return secret_id

    def __repr__(self) -> str:
        return f"AppRoleAuth(mount={self._mount!r})"


@dataclass(frozen=True, slots=True)
class KubernetesAuth:
    """The pod's projected service account token, read again at each login."""

    role: str
    token_file: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    mount: str = "kubernetes"

    @property
    def name(self) -> str:
        return "kubernetes"

    def login(self, ask: Ask) -> Lease:
        """See `AuthMethod.login`."""
        jwt = _read_secret(self.token_file, "service account token")
        try:
            answer = ask(
                "POST",
                f"auth/{self.mount}/login",
                {"role": self.role, "jwt": jwt},
                None,
            )
        except VaultRefused as exc:
            raise _login_refused(
                self.name,
                exc,
                f"check the role: bao read auth/{self.mount}/role/{self.role}",
            ) from exc
        return _lease(self.name, answer)


@dataclass(frozen=True, slots=True)
class ClientCertificateAuth:
    """The TLS client certificate of the session (`VaultSettings.client_certificate`).

    Renewal is bound to the same certificate; after it was replaced there is a new login.
    """

    role: str
    mount: str = "cert"

    @property
    def name(self) -> str:
        return "cert"

    def login(self, ask: Ask) -> Lease:
        """See `AuthMethod.login`."""
        try:
            answer = ask("POST", f"auth/{self.mount}/login", {"name": self.role}, None)
        except VaultRefused as exc:
            raise _login_refused(
                self.name,
                exc,
                f"check the role: bao read auth/{self.mount}/certs/{self.role}",
            ) from exc
        return _lease(self.name, answer)


class TokenKeeper:
    """Holds the current token; logs in on first use and keeps it alive from then on.

    One daemon thread, started by the first login and ended by `close`.
    """

    def __init__(self, auth: AuthMethod, ask: Ask) -> None:
        self._auth = auth
        self._ask = ask
        self._login_lock = threading.Lock()
        self._wake = threading.Condition()
        self._closed = False
        self._lease: Lease | None = None
        self._granted_at = 0.0
        self._due = 0.0
        self._longest = 0.0
        self._failure: tuple[float, CAError] | None = None
        self._thread: threading.Thread | None = None

    @property
    def auth_name(self) -> str:
        """The method's name, for logs."""
        return self._auth.name

    def current(self) -> str | None:
        """The token in use, without asking anybody."""
        lease = self._lease
        return None if lease is None else lease.token

    def token(self) -> str:
        """A token that has not run out; logs in when there is none.

        Raises:
            BackendUnavailable, BackendMisconfigured
        """
        lease = self._lease
        if lease is None or self._has_ended(lease):
            lease = self._login(instead_of=lease)
        return lease.token

    def replace(self, dead: str) -> str:
        """A token other than `dead`, which the server no longer accepts."""
        lease = self._lease
        if lease is not None and lease.token != dead:
            return lease.token
        return self._login(instead_of=lease).token

    def close(self) -> None:
        """Stops the thread; revokes the token if it is ours and the server answers quickly."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=2.0)
        lease, self._lease = self._lease, None
        if lease is None or not lease.owned or self._has_ended(lease):
            return
        try:
            self._ask(
                "POST",
                "auth/token/revoke-self",
                {},
                lease.token,
                repeat=False,
                timeout=1.0,
            )
        except CAError as exc:
            # It ends by itself; batch tokens cannot be revoked at all.
            _logger.info("openbao token not revoked", extra={"why": exc.message})

    def _has_ended(self, lease: Lease) -> bool:
        return bool(lease.duration) and time.monotonic() >= self._granted_at + lease.duration

    def _login(self, *, instead_of: Lease | None) -> Lease:
        with self._login_lock:
            lease = self._lease
            if lease is not None and lease is not instead_of and not self._has_ended(lease):
                return lease  # another thread was first
            if self._failure is not None and time.monotonic() < self._failure[0]:
                raise self._failure[1].with_traceback(None)
            began = time.monotonic()
            try:
                lease = self._auth.login(self._ask)
            except CAError as exc:
                # All threads waiting for this login have their answer too; and a wrong secret
                # stays wrong: one login a second is enough to notice a new one.
                self._failure = (time.monotonic() + _FAILED_LOGIN_SECONDS, exc)
                raise
            self._failure = None
            self._longest = lease.duration
            self._adopt(lease, began)
            _logger.info(
                "logged in to openbao",
                extra={"auth": self._auth.name, "duration_s": lease.duration},
            )
            return lease

    def _adopt(self, lease: Lease, granted_at: float) -> None:
        """Puts a lease in use and tells the thread when to look at it again."""
        early = 1 - _JITTER * _random.random()
        with self._wake:
            self._granted_at = granted_at
            self._due = granted_at + lease.duration * _RENEW_AT * early
            self._lease = lease
            self._wake.notify_all()
            if lease.duration and self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._keep_alive, name="openbao-token", daemon=True
                )
                self._thread.start()

    def _keep_alive(self) -> None:
        while self._wait_until_due():
            lease = self._lease
            if lease is None:
                return
            try:
                if not (lease.renewable and self._renew(lease)):
                    self._login(instead_of=lease)
            except CAError as exc:
                # Still using the old token. A third of its life is left to try again in.
                pause = min(_RETRY_SECONDS, max(lease.duration / 12, 0.1))
                with self._wake:
                    self._due = time.monotonic() + pause
                _logger.warning(
                    "openbao token not renewed",
                    extra={"why": exc.message, "detail": exc.detail, "retry_s": pause},
                )

    def _wait_until_due(self) -> bool:
        """Returns False when the keeper was closed."""
        with self._wake:
            while not self._closed:
                lease = self._lease
                if lease is not None and lease.duration:
                    left = self._due - time.monotonic()
                    if left <= 0:
                        return True
                else:
                    left = 60.0
                self._wake.wait(timeout=left)
            return False

    def _renew(self, lease: Lease) -> bool:
        """Whether the token lasts for another full term; False asks for a new login."""
        began = time.monotonic()
        try:
            answer = self._ask("POST", "auth/token/renew-self", {}, lease.token)
        except VaultRefused as exc:
            _logger.info("openbao token cannot be renewed", extra={"detail": exc.detail})
            return False
        renewed = _lease(self._auth.name, answer, token=lease.token, owned=lease.owned)
        self._longest = max(self._longest, renewed.duration)
        grows = renewed.duration >= self._longest * _STILL_GROWING
        if self._lease is not lease:
            return True  # replaced meanwhile
        if grows or not lease.owned:
            # A token that is not ours cannot be replaced by logging in: use it to its end.
            self._adopt(renewed, began)
            return True
        return False


def _lease(
    method: str,
    answer: Mapping[str, Any],
    *,
    token: str | None = None,
    owned: bool = True,
) -> Lease:
    found = answer.get("auth")
    if not isinstance(found, dict) or not isinstance(found.get("client_token", token), str):
        raise VaultUnavailable(
            "OpenBao's answer to a login has no token in it",
            detail=f"auth method {method}",
        )
    return Lease(
        token=token or found["client_token"],
        duration=float(found.get("lease_duration") or 0),
        renewable=bool(found.get("renewable")),
        owned=owned,
    )


def _read_secret(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            secret = file.read(_MAX_SECRET_BYTES + 1).strip().decode("ascii")
    except (OSError, UnicodeDecodeError) as exc:
        raise BackendMisconfigured(
            f"the file with the OpenBao {what} cannot be read",
            hint="check the path and that the broker's user may read it",
            detail=f"{path}: {type(exc).__name__}",
        ) from None  # a decode error quotes the file
    if not secret or len(secret) > _MAX_SECRET_BYTES or not secret.isprintable() or " " in secret:
        raise BackendMisconfigured(
            f"the file with the OpenBao {what} is empty or holds something else",
            detail=str(path),
        )
    return secret


def _login_refused(method: str, exc: VaultRefused, hint: str) -> BackendMisconfigured:
    if exc.status not in _LOGIN_STATUSES:
        return exc  # TLS, redirects: said better where it happened
    return BackendMisconfigured(
        f'OpenBao refused the broker\'s login with auth method "{method}"',
        hint=hint,
        detail=exc.detail,
    )


def _compromised(why: str) -> WrappedSecretCompromised:
    return WrappedSecretCompromised(
        f"the wrapped secret-id must be treated as compromised: {why}",
        hint="revoke the role's secret-ids, look into the audit log for sys/wrapping/unwrap, "
        "and provision a new one",
    )
