"""Whether the broker can do its work, dependency by dependency.

- Checks only look: they sign nothing and write nothing.
- They run at the same time, each with its own time limit, and at most once a second however
  many ask; those who ask meanwhile share the answer.
- What a dependency says in its own words stays in the log: readiness is read by anyone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from identity_broker.errors import BrokerError
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import Metrics
from identity_ca.errors import CAError

_log = get_logger("readiness")
Check: TypeAlias = Callable[[], Awaitable[None]]
TIMEOUT_SECONDS: Final = 3.0
FRESH_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class DependencyState:
    """What one check found; `reason` is empty when it is up."""

    up: bool
    reason: str = ""
    message: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the HTTP answer."""
        if self.up:
            return {"ready": True}
        return {
            "ready": False,
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
        }


@dataclass(frozen=True, slots=True)
class ReadinessReport:
    """The state of every dependency."""

    dependencies: Mapping[str, DependencyState]

    @property
    def ready(self) -> bool:
        """Whether all of them are up."""
        return all(state.up for state in self.dependencies.values())

    def to_json(self) -> dict[str, Any]:
        """For the HTTP answer."""
        return {
            "ready": self.ready,
            "dependencies": {name: state.to_json() for name, state in self.dependencies.items()},
        }


class Readiness:
    """Asks the dependencies.

    Args:
        checks: name → check; it returns when the dependency can be used, else raises a
            BrokerError or CAError. The names are a closed set: they are metric labels.
        metrics: `dependency_up` follows the answers.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        checks: Mapping[str, Check],
        metrics: Metrics,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._checks = checks
        self._metrics = metrics
        self._monotonic = monotonic
        self._timeout = timeout_seconds
        self._latest: ReadinessReport | None = None
        self._asked_at = 0.0
        self._asking: asyncio.Task[ReadinessReport] | None = None

    async def report(self) -> ReadinessReport:
        """The state now, or at most a second ago. Never raises."""
        if self._latest is not None and self._monotonic() - self._asked_at < FRESH_SECONDS:
            return self._latest
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="readiness")
        # One who gives up waiting must not take the answer from the others.
        return await asyncio.shield(self._asking)

    async def _ask(self) -> ReadinessReport:
        try:
            asked_at = self._monotonic()
            states = await asyncio.gather(
                *(self._state(name, check) for name, check in self._checks.items())
            )
            self._latest = ReadinessReport(
                MappingProxyType(dict(zip(self._checks, states, strict=True)))
            )
            self._asked_at = asked_at
            return self._latest
        finally:
            self._asking = None

    async def _state(self, name: str, check: Check) -> DependencyState:
        state = await self._asked(name, check)
        self._metrics.dependency_up.labels(name).set(1 if state.up else 0)
        if not state.up and (
            self._latest is None or self._latest.dependencies[name].reason != state.reason
        ):
            _log.warning("dependency down", dependency=name, reason=state.reason)
        return state

    async def _asked(self, name: str, check: Check) -> DependencyState:
        try:
            async with asyncio.timeout(self._timeout):
                await check()
        except BrokerError as exc:
            return DependencyState(False, exc.reason, exc.public, exc.hint)
        except CAError as exc:
            return DependencyState(False, exc.reason, exc.message, exc.hint)
        except TimeoutError:
            return DependencyState(
                False, "DEADLINE_EXCEEDED", "it did not answer in time", "idb doctor"
            )
        except Exception as exc:  # noqa: BLE001  # a broken check is a dependency that is not up
            _log.error(
                "readiness check failed",
                dependency=name,
                error=str(exc),
                error_type=type(exc).__name__,
            )
            return DependencyState(False, "INTERNAL", "the check itself failed", "see the log")
        return DependencyState(True)
