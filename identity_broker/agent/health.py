"""How the agent is doing, from facts: what it can serve, and what is wrong.

- Without input, output or clocks: facts in, a judgement out.
- DOWN means that no workload gets anything. Everything else that is wrong is DEGRADED: what is
  valid is served, and the sentence says what will happen if nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from identity_client.node.values import NodePhase, NodeStatus

_MOST_SKEW: Final = 30.0
_LONGEST_SILENCE: Final = 5.0  # a stream that is opened again at once is no problem


class Health(StrEnum):
    """In one word."""

    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the judgement is made from.

    Attributes:
        synced: whether the broker ever told what this node may have.
        connected: whether the stream to the broker stands.
        silent_for: seconds since it broke.
        heard_at: when the broker was last heard.
        skew: how far the broker's clock is ahead of ours, in seconds.
        out_of_step: why its last update was not applied; empty when it was.
        held, overdue, expired: X.509-SVIDs: all, those past their renewal time, those of no use.
        order_problem: why the last order failed; empty when it did not.
    """

    node: NodeStatus
    synced: bool
    connected: bool
    silent_for: float = 0.0
    heard_at: datetime | None = None
    skew: float = 0.0
    out_of_step: str = ""
    held: int = 0
    overdue: int = 0
    expired: int = 0
    order_problem: str = ""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The judgement, and a sentence for everything that is wrong."""

    health: Health
    problems: tuple[str, ...] = ()


def judge(facts: Facts, now: datetime) -> HealthReport:
    """The state of the agent."""
    problems = [*_node_problems(facts.node, now), *_stream_problems(facts)]
    if facts.overdue:
        why = f": {facts.order_problem}" if facts.order_problem else ""
        problems.append(f"{facts.overdue} X.509-SVIDs could not be renewed in time{why}")
    if facts.expired:
        problems.append(f"{facts.expired} X.509-SVIDs have expired")
    if abs(facts.skew) > _MOST_SKEW:
        behind = "behind" if facts.skew > 0 else "ahead of"
        problems.append(
            f"this machine's clock is {round(abs(facts.skew))} seconds {behind} the broker's"
        )
    serves_nothing = not facts.synced or (facts.held > 0 and facts.expired == facts.held)
    if serves_nothing or facts.node.phase is NodePhase.BANNED:
        return HealthReport(Health.DOWN, tuple(problems))
    return HealthReport(Health.DEGRADED if problems else Health.OK, tuple(problems))


def _node_problems(node: NodeStatus, now: datetime) -> list[str]:
    why = f": {node.last_error}" if node.last_error is not None else ""
    problems = []
    if node.phase is NodePhase.BANNED:
        problems.append("an operator banned this node; nothing is handed out")
    elif node.phase is NodePhase.REFUSED:
        problems.append(f"the broker refuses this node{why}")
    elif node.phase is NodePhase.ATTESTING:
        problems.append(f"this node is not attested{why}")
    elif node.expires_at is not None and node.expires_at <= now:
        problems.append(f"the node's own SVID has expired{why}")
    if node.state_problem:
        problems.append(f"the node's key cannot be kept: {node.state_problem}")
    return problems


def _stream_problems(facts: Facts) -> list[str]:
    problems = []
    attested = facts.node.phase is NodePhase.ATTESTED
    if attested and not facts.connected and facts.silent_for > _LONGEST_SILENCE:
        why = f": {facts.node.last_error}" if facts.node.last_error is not None else ""
        if facts.heard_at is None:
            problems.append(f"the broker was never heard{why}")
        else:
            since = facts.heard_at.isoformat(timespec="seconds")
            problems.append(f"the broker was last heard at {since}{why}")
    if attested and facts.connected and not facts.synced:
        problems.append("the broker has not told what this node may have")
    if facts.out_of_step:
        problems.append(f"not in step with the broker: {facts.out_of_step}")
    return problems
