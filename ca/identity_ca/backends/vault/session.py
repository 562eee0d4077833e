"""Every call to OpenBao or Vault goes through here: token, retries, breaker, errors.

- Whatever goes wrong leaves as `BackendUnavailable` with `retry_after`, or as
  `BackendMisconfigured` when the same call would fail again.
- A call ends within `settings.timeout` seconds, retries included. Only what is often gone a moment
  later is repeated: 412, 502, 503, 504, 500 without a leader, and connections that broke.
- A server that is down is asked by one call a second; all others fail at once (`breaker`).
- Answers are always dicts: `{}` for 204, where hvac would hand out a `Response`.
- No token or secret is in any message, `repr` or log record.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import SystemRandom
from typing import Any, Final, Self

from identity_ca.backends.vault.auth import AuthMethod, TokenKeeper
from identity_ca.backends.vault.breaker import CircuitBreaker
from identity_ca.backends.vault.wire import (
    JsonObject,
    Reply,
    VaultRefused,
    VaultSettings,
    VaultUnavailable,
    Wire,
)

__all__ = [
    "VaultHealth",
    "VaultRefused",
    "VaultSession",
    "VaultSettings",
    "VaultUnavailable",
]

_logger = logging.getLogger(__name__)
_random = SystemRandom()

_RETRYABLE: Final = frozenset({412, 502, 503, 504})
_MAX_ATTEMPTS: Final = 4
_FIRST_PAUSE: Final = 0.05
_LONGEST_RATE_LIMIT_WAIT: Final = 1.0
# 472 and 473 are Vault Enterprise's standbys; a body comes with each of these.
_HEALTH_STATUSES: Final = frozenset({200, 429, 472, 473, 501, 503})
_NO_LEADER: Final = re.compile(r"active cluster node not found|not active|no active", re.IGNORECASE)
_SEALED: Final = re.compile(r"\bsealed\b", re.IGNORECASE)
# These are answered with 500 and are about the call: a version or an issuer that is not there, a
# token that has reached its maximum.
_CALLERS_FAULT: Final = re.compile(
    r"key version|unable to find PKI issuer|cannot renew", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class VaultHealth:
    """What `sys/health` says.

    Attributes:
        initialized, sealed, standby: the server's state; a standby answers reads and signs.
        version: of the server.
        clock_skew: the server's clock minus ours, to about a second; None when it does not say.
    """

    initialized: bool
    sealed: bool
    standby: bool
    version: str
    clock_skew: timedelta | None


class VaultSession:
    """A logged-in connection to one OpenBao or Vault; safe to use from several threads.

    Nothing is sent before the first call. `close` gives the token back.

    Args:
        settings: where the server is.
        auth: how to log in (`backends.vault.auth`).
    """

    def __init__(self, settings: VaultSettings, auth: AuthMethod) -> None:
        self._settings = settings
        self._wire = Wire(settings)
        self._breaker = CircuitBreaker(settings.open_seconds)
        self._closed = threading.Event()
        self._keeper = TokenKeeper(auth, self._ask_as)

    @property
    def settings(self) -> VaultSettings:
        """What this session was built with."""
        return self._settings

    def get(self, path: str, *, params: Mapping[str, str] | None = None) -> JsonObject:
        """`request("GET", …)`."""
        return self.request("GET", path, params=params)

    def post(self, path: str, body: JsonObject, *, repeat: bool = True) -> JsonObject:
        """`request("POST", …)`."""
        return self.request("POST", path, body=body, repeat=repeat)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: JsonObject | None = None,
        params: Mapping[str, str] | None = None,
        repeat: bool = True,
    ) -> JsonObject:
        """One call with the session's token; the whole JSON answer (`data`, `auth`, `warnings`).

        Args:
            path: below `/v1/`, e.g. `transit/sign/idb-x509`.
            repeat: whether the call may be sent again when it is unknown if it took effect.

        Raises:
            BackendUnavailable: no answer, sealed, no leader, rate limited; `retry_after` is set.
            BackendMisconfigured: refused (`VaultRefused`, with `.status` and `.errors`).
        """
        if self._closed.is_set():
            raise VaultUnavailable("the OpenBao session is closed", retry_after=None, sent=False)
        deadline = time.monotonic() + self._settings.timeout
        probing = self._breaker.enter(patience=self._settings.timeout)
        token = self._keeper.token()
        reply = self._attempts(
            method,
            path,
            body,
            params,
            token=token,
            deadline=deadline,
            repeat=repeat and not probing,
        )
        if reply.status == 403 and self._is_dead(token, deadline):
            _logger.warning("openbao token no longer accepted, logging in again")
            token = self._keeper.replace(token)
            reply = self._attempts(
                method,
                path,
                body,
                params,
                token=token,
                deadline=deadline,
                repeat=repeat,
            )
        return _accepted(method, path, reply)

    def health(self, now: datetime) -> VaultHealth:
        """The server's state, asked without a token and past the breaker.

        Args:
            now: the caller's clock, to compare the server's with.

        Raises:
            BackendUnavailable: no answer.
        """
        began = time.monotonic()
        # GET, not HEAD: hvac's default HEAD has no body, and 429 would be a rate limit elsewhere.
        reply = self._wire.exchange(
            "GET", "sys/health", deadline=began + min(self._settings.timeout, 5.0)
        )
        if reply.status not in _HEALTH_STATUSES or "initialized" not in reply.body:
            raise VaultUnavailable(
                "what answers at the OpenBao address does not tell its health",
                detail=f"status {reply.status}",
                status=reply.status,
            )
        middle = now + timedelta(seconds=(time.monotonic() - began) / 2)
        server_time = reply.body.get("server_time_utc")
        return VaultHealth(
            initialized=bool(reply.body["initialized"]),
            sealed=bool(reply.body.get("sealed")),
            standby=bool(reply.body.get("standby")),
            version=str(reply.body.get("version", "")),
            clock_skew=(
                datetime.fromtimestamp(server_time, UTC) - middle
                if isinstance(server_time, int)
                else None
            ),
        )

    def close(self) -> None:
        """Stops renewing, revokes the token if the server answers, closes connections."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._keeper.close()
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"VaultSession({self._settings.address!r}, auth={self._keeper.auth_name!r})"

    def _ask_as(
        self,
        method: str,
        path: str,
        body: JsonObject | None,
        token: str | None,
        *,
        repeat: bool = True,
        timeout: float | None = None,
    ) -> JsonObject:
        """A call of the auth methods: their own token or none, past the breaker."""
        deadline = time.monotonic() + (timeout or self._settings.timeout)
        reply = self._attempts(
            method, path, body, None, token=token, deadline=deadline, repeat=repeat
        )
        return _accepted(method, path, reply)

    def _attempts(
        self,
        method: str,
        path: str,
        body: JsonObject | None,
        params: Mapping[str, str] | None,
        *,
        token: str | None,
        deadline: float,
        repeat: bool,
    ) -> Reply:
        """Asks until there is an answer that is not the server's own trouble; tells the breaker."""
        attempt = 0
        while True:
            attempt += 1
            try:
                reply = self._wire.exchange(
                    method, path, deadline=deadline, body=body, params=params, token=token
                )
            except VaultUnavailable as exc:
                trouble = exc
            else:
                found = _trouble(reply)
                if found is None:
                    self._breaker.succeeded()
                    return reply
                trouble = found
            pause = self._pause(trouble, attempt, deadline, repeat=repeat)
            if pause is None or self._closed.wait(pause):
                if trouble.status == 500 and not (trouble.sealed or trouble.transient):
                    # About this call, as far as anybody can tell; the next costs no waiting.
                    self._breaker.succeeded()
                else:
                    self._breaker.failed(trouble)
                raise trouble
            _logger.debug("openbao call repeated", extra={"path": path, "attempt": attempt})

    def _pause(
        self, trouble: VaultUnavailable, attempt: int, deadline: float, *, repeat: bool
    ) -> float | None:
        """Seconds to wait before the next attempt, or None to give up now."""
        if attempt >= _MAX_ATTEMPTS or not (repeat or not trouble.sent):
            return None
        if trouble.status == 429:
            wanted = trouble.retry_after if trouble.retry_after is not None else 1.0
            pause = wanted if wanted <= _LONGEST_RATE_LIMIT_WAIT and attempt == 1 else None
        elif trouble.transient:
            # Jitter keeps the threads of one process, and brokers, from coming back in step.
            pause = _FIRST_PAUSE * 2 ** (attempt - 1) * _random.uniform(0.5, 1.0)
        else:
            pause = None
        if pause is None or time.monotonic() + pause >= deadline:
            return None
        return pause

    def _is_dead(self, token: str, deadline: float) -> bool:
        """Whether a 403 means the token, not the policy: the two answers look alike."""
        if self._keeper.current() != token:
            return True  # another thread has replaced it already
        reply = self._attempts(
            "GET",
            "auth/token/lookup-self",
            None,
            None,
            token=token,
            deadline=deadline,
            repeat=True,
        )
        return reply.status == 403


def _trouble(reply: Reply) -> VaultUnavailable | None:
    """The server's own trouble, or None when the answer is about the call."""
    status = reply.status
    said = "; ".join(reply.errors)
    if status == 429:
        return VaultUnavailable(
            "OpenBao limits the rate of our calls",
            hint="raise the quota of the broker's path: bao read sys/quotas/rate-limit/NAME",
            detail=said,
            retry_after=reply.retry_after if reply.retry_after is not None else 1.0,
            status=status,
            sent=False,
        )
    if status < 500 and status not in _RETRYABLE:
        return None
    if status == 500 and _CALLERS_FAULT.search(said) is not None:
        return None
    if status in {500, 503} and _SEALED.search(said) is not None:
        return VaultUnavailable(
            "OpenBao is sealed",
            hint="unseal it: bao operator unseal",
            detail=said,
            status=status,
            sealed=True,
            sent=False,
        )
    if status == 501:
        return VaultUnavailable(
            "OpenBao is not initialised",
            hint="initialise it: bao operator init",
            status=status,
        )
    no_leader = _NO_LEADER.search(said) is not None
    return VaultUnavailable(
        "OpenBao has no active node" if no_leader else "OpenBao failed to answer",
        hint="bao status shows the state of the server",
        detail=f"status {status}: {said}",
        retry_after=reply.retry_after or 1.0,
        status=status,
        transient=status in _RETRYABLE or no_leader,
        sent=not no_leader,
    )


def _accepted(method: str, path: str, reply: Reply) -> JsonObject:
    """The body of a good answer.

    Raises:
        VaultRefused: for every other one.
    """
    if reply.is_success:
        return reply.body
    said = "; ".join(reply.errors)
    sentence, hint = _REFUSALS.get(reply.status, ("OpenBao refused a call", ""))
    raise VaultRefused(
        sentence,
        hint=hint.format(path=path, capability=_CAPABILITIES.get(method, "update")),
        detail=f"{method} {path}: status {reply.status}: {said}",
        status=reply.status,
        errors=reply.errors,
    )


_CAPABILITIES: Final[Mapping[str, str]] = {"GET": "read", "LIST": "list", "DELETE": "delete"}
_PROVISION: Final = "python -m identity_ca.backends.vault.provision"
_POLICY_HINT: Final = (
    'the policy of the broker\'s role needs: path "{path}" {{ capabilities = ["{capability}"] }}; '
    f"{_PROVISION} --print-policy shows all of it"
)
_MOUNT_HINT: Final = f"check the mount and names, or set them up: {_PROVISION} --help"
_REFUSALS: Final[Mapping[int, tuple[str, str]]] = {
    400: ("OpenBao refused a call as invalid", ""),
    403: ("OpenBao's policy denies the broker a call", _POLICY_HINT),
    404: ("OpenBao has nothing at a path the broker uses", _MOUNT_HINT),
    405: ("OpenBao does not offer a call the broker uses", "check the server's version"),
}


def data_of(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `data` object of an answer; empty when there is none (204, or a JSON null)."""
    data = answer.get("data")
    return data if isinstance(data, dict) else {}
