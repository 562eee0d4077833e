"""The node agent, measured: which rows there are, how long each takes, and what they find.

- Each row has agents of its own; all but the one of memory share a broker.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import agent_calls, agent_life, agent_push, agent_rotation
from bench.agent_calls import Cold, Warm
from bench.agent_life import AgentFootprint, AgentStart
from bench.agent_push import Push
from bench.agent_rotation import Rotation
from bench.agent_site import site

PUSH, FETCH, JWT, MEMORY, START, ROTATION = NAMES = (
    "agent push",
    "agent fetch",
    "agent jwt",
    "agent memory",
    "agent start",
    "agent rotation",
)
_SHARING = (PUSH, FETCH, JWT, START, ROTATION)


@dataclass(frozen=True)
class AgentPlan:
    """How much of everything.

    Attributes:
        others: numbers of agents beside the one that is looked at.
        changes: of each kind; half as many of "first".
        to_all: changes that concern every agent.
        idle_seconds: how long nothing changes, for the broker's own needs.
    """

    others: tuple[int, ...] = (0, 999)
    changes: int = 300
    to_all: int = 20
    idle_seconds: float = 5.0
    fetch_rounds: int = 5
    fetch_calls: int = 100
    jwt_rounds: int = 5
    jwt_seconds: float = 1.5
    warm_up: float = 0.3
    jwt_at_once: int = 16
    svids: tuple[int, ...] = (10, 1_000, 10_000)
    starts: int = 5
    rotations: int = 50
    envoy_rotations: int = 30


QUICK = AgentPlan(
    others=(0, 9),
    changes=4,
    to_all=2,
    idle_seconds=0.2,
    fetch_rounds=1,
    fetch_calls=4,
    jwt_rounds=1,
    jwt_seconds=0.2,
    warm_up=0.05,
    svids=(20,),
    starts=1,
    rotations=2,
    envoy_rotations=2,
)


@dataclass
class AgentResults:
    """What was found."""

    push: list[Push] = field(default_factory=list)
    cold: Cold | None = None
    warm: Warm | None = None
    footprints: list[AgentFootprint] = field(default_factory=list)
    start: AgentStart | None = None
    rotation: Rotation | None = None

    @property
    def verified(self) -> int:
        """Answers looked at in full; those of the other rows are looked at as well."""
        return sum(push.verified for push in self.push)

    def document(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def measure(
    plan: AgentPlan, wanted: Collection[str], directory: Path, say: Callable[[str], None]
) -> AgentResults:
    """Every row that is wanted."""
    found = AgentResults()
    if any(name in wanted for name in _SHARING):
        with site(directory / "agents") as place:
            if START in wanted:
                say("agent: start to first SVID")
                found.start = agent_life.starts(place, rounds=plan.starts)
            if FETCH in wanted:
                say("agent: FetchX509SVID from a cold connect")
                found.cold = agent_calls.measure_cold(
                    place, rounds=plan.fetch_rounds, calls=plan.fetch_calls
                )
            if JWT in wanted:
                say("agent: cached FetchJWTSVID")
                found.warm = agent_calls.measure_warm(
                    place,
                    rounds=plan.jwt_rounds,
                    seconds=plan.jwt_seconds,
                    warm_up=plan.warm_up,
                    at_once=plan.jwt_at_once,
                )
            if ROTATION in wanted:
                say("agent: rotations")
                found.rotation = agent_rotation.measure(
                    place, times=plan.rotations, envoy_times=plan.envoy_rotations
                )
            for others in plan.others if PUSH in wanted else ():
                say(f"agent: changes pushed, {others + 1:,} connected")
                found.push.append(
                    agent_push.measure(
                        place,
                        others=others,
                        samples=plan.changes,
                        to_all=plan.to_all if others else 0,
                        idle_seconds=plan.idle_seconds,
                        name=f"push-{others}",
                    )
                )
    if MEMORY in wanted:
        say("agent: memory")
        found.footprints = agent_life.footprints(directory / "agent-memory", plan.svids)
    return found
