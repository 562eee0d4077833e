"""The first message of a stream that both sides talk on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, TypeVar

from google.protobuf.message import Message

from identity_broker.errors import MalformedRequest

_SECONDS: Final = 10.0


G = TypeVar("G", bound=Message)
"""A request whose oneof is called `step`."""


async def greeting(requests: AsyncIterator[G]) -> G:
    """The first request, if its step is `hello`.

    Raises:
        MalformedRequest: anything else, or nothing for a while.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            first = await anext(requests, None)
    except TimeoutError as error:
        raise MalformedRequest("the first message did not come in time") from error
    if first is None or first.WhichOneof("step") != "hello":
        raise MalformedRequest("the first message must be hello")
    return first
