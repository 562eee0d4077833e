"""grpc.health.v1, answered from what the broker knows of its own readiness.

- The empty name is the broker as a whole; the other names are its services.
- Watchers are told of every change; the last state before a drain is NOT_SERVING.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc_health.v1 import health_pb2

from identity_broker.errors import ServiceNotFound
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.pipeline import ServiceFunction

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The serving state of the broker and its services.

    Args:
        names: services to answer for, beside the empty name; all start as not serving.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._states = dict.fromkeys(["", *names], False)
        self._changed = asyncio.Event()

    def set(self, name: str, serving: bool) -> None:  # noqa: FBT001  # it is what is set
        """Say whether the service serves; the empty name stands for the whole broker."""
        if self._states.get(name) is not serving:
            self._states[name] = serving
            self._announce()

    def set_all(self, serving: bool) -> None:  # noqa: FBT001  # it is what is set
        """Say it of the broker and all of its services."""
        if any(state is not serving for state in self._states.values()):
            self._states = dict.fromkeys(self._states, serving)
            self._announce()

    def services(self) -> dict[str, ServiceFunction]:
        """The functions of grpc.health.v1.Health."""
        return {
            "/grpc.health.v1.Health/Check": self._check,
            "/grpc.health.v1.Health/List": self._list,
            "/grpc.health.v1.Health/Watch": self._watch,
        }

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _check(
        self, request: health_pb2.HealthCheckRequest, _call: Call
    ) -> health_pb2.HealthCheckResponse:
        state = self._states.get(request.service)
        if state is None:
            raise ServiceNotFound
        return _answer(state)

    async def _list(self, _request: Any, _call: Call) -> Any:
        # The published stubs for types lag behind the package and do not know this message.
        listing: Any = vars(health_pb2)["HealthListResponse"]
        return listing(statuses={name: _answer(state) for name, state in self._states.items()})

    async def _watch(
        self, request: health_pb2.HealthCheckRequest, _call: Call
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told: bool | None = None
        first = True
        while True:
            changed = self._changed
            state = self._states.get(request.service)
            if first or state is not told:
                yield _answer(state)
            told, first = state, False
            await changed.wait()


def _answer(state: bool | None) -> health_pb2.HealthCheckResponse:  # noqa: FBT001  # what is told
    if state is None:
        return health_pb2.HealthCheckResponse(status=_UNKNOWN)
    return health_pb2.HealthCheckResponse(status=_SERVING if state else _NOT_SERVING)
