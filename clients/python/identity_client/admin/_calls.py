"""One unary call: its deadline, its errors, its pages.

- A failure leaves as an IdentityError with the broker's own reason, hint and correlation id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc

from identity_client._wire.status import error_from_rpc

A = TypeVar("A")

PAGE_SIZE = 500
BATCH_SIZE = 500


class _HasNextPage(Protocol):
    @property
    def next_page_token(self) -> str: ...


P = TypeVar("P", bound=_HasNextPage)


def call(method: Callable[..., A], request: object, timeout: float) -> A:
    """Call `method` and return its answer.

    Raises:
        IdentityError: the leaf that stands for what went wrong.
    """
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as exc:
        raise error_from_rpc(exc) from exc


def pages(fetch: Callable[[str], P]) -> Iterator[P]:
    """Every page, from the first; `fetch` takes a page token."""
    token = ""
    while True:
        page = fetch(token)
        yield page
        token = page.next_page_token
        if not token:
            return
