"""What the agent does with JWT-SVIDs that the broker refuses: little, and quietly."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import pytest
from structlog.testing import capture_logs

from identity_broker.agent import tokens as module
from identity_broker.agent.mirror import EntryChange, Mirror
from identity_broker.agent.tokens import Tokens
from identity_broker.domain.clock import SystemClock
from identity_broker.errors import AgentNotReady, AudienceInvalid, BrokerError, NoIdentity
from identity_broker.telemetry.metrics import AgentMetrics
from identity_ca.spiffe_id import TrustDomain
from identity_client.errors import (
    BrokerUnavailable,
    IdentityError,
    NotPermitted,
    RequestRejected,
)
from identity_client.node.values import (
    IssuedJwt,
    IssuedX509,
    JwtRequest,
    SyncedEntry,
    X509Request,
)

WEB = SyncedEntry("web", 1, "spiffe://example.org/web", ("unix:uid:0",))
API = SyncedEntry("api", 1, "spiffe://example.org/api", ("unix:uid:0",))
REFUSED = NotPermitted("not yours", reason="ENTRY_NOT_AUTHORIZED")
REJECTED = RequestRejected("not that one", reason="AUDIENCE_INVALID")


class RefusingNode:
    """A node whose broker refuses everything."""

    def __init__(self, error: IdentityError) -> None:
        self.error = error
        self.orders: list[JwtRequest] = []

    async def issue_x509(self, orders: Sequence[X509Request]) -> list[IssuedX509 | IdentityError]:
        raise AssertionError("nobody asked for one")

    async def issue_jwt(self, orders: Sequence[JwtRequest]) -> list[IssuedJwt | IdentityError]:
        self.orders.extend(orders)
        return [self.error for _ in orders]


def tokens_of(node: RefusingNode) -> Tokens:
    return Tokens(
        node=node,
        mirror=Mirror(TrustDomain("example.org")),
        clock=SystemClock(),
        metrics=AgentMetrics(),
        limit=10,
    )


async def refusal(tokens: Tokens, entry: SyncedEntry, *audiences: str) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        await tokens.get(entry, audiences)
    return caught.value


async def test_a_refused_entry_is_ordered_once_a_second_whatever_the_audience() -> None:
    node = RefusingNode(REFUSED)
    tokens = tokens_of(node)
    for number in range(50):
        assert isinstance(await refusal(tokens, WEB, f"a{number}"), NoIdentity)
    assert len(node.orders) == 1
    await refusal(tokens, API, "a")  # another entry is another matter
    assert len(node.orders) == 2
    tokens.follow([EntryChange(WEB, WEB)])  # and a change may have put it right
    await refusal(tokens, WEB, "a0")
    assert len(node.orders) == 3


async def test_a_refused_audience_is_ordered_once_a_second(monkeypatch: Any) -> None:
    node = RefusingNode(REJECTED)
    tokens = tokens_of(node)
    for _ in range(50):
        assert isinstance(await refusal(tokens, WEB, "a", "b"), AudienceInvalid)
    assert len(node.orders) == 1
    await refusal(tokens, WEB, "a")
    assert len(node.orders) == 2
    later = monotonic() + 1.1
    monkeypatch.setattr(module, "monotonic", lambda: later)
    await refusal(tokens, WEB, "b", "a")
    assert len(node.orders) == 3


async def test_a_broker_that_is_away_is_asked_each_time() -> None:
    node = RefusingNode(BrokerUnavailable("away"))
    tokens = tokens_of(node)
    for _ in range(3):
        assert isinstance(await refusal(tokens, WEB, "a"), AgentNotReady)
    assert len(node.orders) == 3


@pytest.mark.parametrize("error", [REJECTED, BrokerUnavailable("away")])
async def test_a_flood_of_failures_is_one_line_for_an_entry_and_reason(
    error: IdentityError,
) -> None:
    tokens = tokens_of(RefusingNode(error))
    with capture_logs() as lines:
        for number in range(100):
            await refusal(tokens, WEB, f"a{number}")
        await refusal(tokens, API, "a")
    told = [(line["entry_id"], line["reason"]) for line in lines]
    assert told == [("web", error.reason), ("api", error.reason)]


@pytest.mark.parametrize(
    "audiences",
    [
        [f"{number:02}" + "x" * 500 for number in range(32)],
        ["line\nfeed"],
        ["a" * 513],
    ],
)
async def test_what_the_broker_is_bound_to_refuse_is_not_ordered(audiences: list[str]) -> None:
    node = RefusingNode(REJECTED)
    tokens = tokens_of(node)
    with capture_logs() as lines:
        assert isinstance(await refusal(tokens, WEB, *audiences), AudienceInvalid)
    assert node.orders == []
    assert lines == []


async def test_refusals_are_remembered_in_bounded_memory() -> None:
    tokens = tokens_of(RefusingNode(REJECTED))
    for number in range(module._MOST_REFUSED + 100):
        await refusal(tokens, WEB, f"a{number}")
    assert len(tokens._refusals._errors) == module._MOST_REFUSED
