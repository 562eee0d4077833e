"""What the agent says of itself, from facts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from identity_broker.agent.health import Facts, Health, judge
from identity_client.errors import BrokerUnavailable, NotAuthenticated, NotPermitted
from identity_client.node.values import NodePhase, NodeStatus

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NODE = NodeStatus(NodePhase.ATTESTED, "spiffe://example.org/n", "ff", NOW + timedelta(hours=1))
WELL = Facts(NODE, synced=True, connected=True, heard_at=NOW, held=2)
AWAY = BrokerUnavailable("the broker does not answer")


def test_nothing_wrong_is_ok_and_says_nothing() -> None:
    report = judge(WELL, NOW)
    assert report.health is Health.OK
    assert report.problems == ()


@pytest.mark.parametrize(
    ("facts", "health", "words"),
    [
        ({"synced": False, "held": 0}, Health.DOWN, "has not told"),
        ({"connected": False, "silent_for": 60.0}, Health.DEGRADED, "last heard at 2030-01-01"),
        (
            {"connected": False, "silent_for": 60.0, "heard_at": None, "synced": False},
            Health.DOWN,
            "never heard",
        ),
        ({"overdue": 1, "order_problem": "AWAY"}, Health.DEGRADED, "renewed in time: AWAY"),
        ({"expired": 1}, Health.DEGRADED, "1 X.509-SVIDs have expired"),
        ({"expired": 2}, Health.DOWN, "2 X.509-SVIDs have expired"),
        ({"skew": 100.4}, Health.DEGRADED, "100 seconds behind"),
        ({"skew": -100.4}, Health.DEGRADED, "100 seconds ahead of"),
        ({"out_of_step": "an update is missing"}, Health.DEGRADED, "an update is missing"),
        ({"node": replace(NODE, state_problem="no space")}, Health.DEGRADED, "no space"),
        (
            {"node": replace(NODE, phase=NodePhase.BANNED, last_error=NotPermitted())},
            Health.DOWN,
            "banned",
        ),
        (
            {"node": replace(NODE, phase=NodePhase.REFUSED, last_error=NotAuthenticated())},
            Health.DEGRADED,
            "refuses this node",
        ),
        (
            {"node": NodeStatus(NodePhase.ATTESTING, last_error=AWAY), "synced": False},
            Health.DOWN,
            "not attested: the broker does not answer",
        ),
        (
            {"node": replace(NODE, expires_at=NOW, last_error=AWAY)},
            Health.DEGRADED,
            "own SVID has expired",
        ),
    ],
)
def test_every_fact_that_is_wrong_has_its_sentence(
    facts: dict[str, Any], health: Health, words: str
) -> None:
    report = judge(replace(WELL, **facts), NOW)
    assert report.health is health
    assert any(words in problem for problem in report.problems)


def test_a_stream_that_is_opened_again_at_once_is_no_problem() -> None:
    assert judge(replace(WELL, connected=False, silent_for=1.0), NOW).health is Health.OK


def test_an_agent_without_any_svid_is_not_down_for_that() -> None:
    assert judge(replace(WELL, held=0), NOW).health is Health.OK
