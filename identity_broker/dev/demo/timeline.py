"""What the audience sees: moments in the order they happened, and steps that hold or do not.

- A step that does not hold ends the demonstration; the moments up to it are all there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from identity_broker.dev.errors import DemoStepFailed


class Mood(StrEnum):
    """What sort of moment."""

    ACT = "act"  # a new act begins
    TALK = "talk"  # something happens
    COMMAND = "command"  # what an operator would type
    NEXT = "next"  # what the audience may type
    HELD = "held"  # a step of the demonstration held
    FAILED = "failed"  # … or did not


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of the timeline; `elapsed` in seconds since the curtain rose."""

    elapsed: float
    actor: str
    text: str
    mood: Mood


class Timeline:
    """Collects moments and shows each as it happens."""

    def __init__(self, show: Callable[[Moment], None]) -> None:
        self._show = show
        self._began = time.monotonic()
        self.moments: list[Moment] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the curtain rose."""
        return time.monotonic() - self._began

    def act(self, title: str) -> None:
        """A new act."""
        self._add("", title, Mood.ACT)

    def say(self, actor: str, text: str) -> None:
        """Something happened."""
        self._add(actor, text, Mood.TALK)

    def command(self, text: str) -> None:
        """The operator types something."""
        self._add("operator", f"$ {text}", Mood.COMMAND)

    def next(self, text: str) -> None:
        """Something the audience may type."""
        self._add("", text, Mood.NEXT)

    def step(self, actor: str, text: str, *, holds: bool) -> None:
        """A step of the demonstration.

        Raises:
            DemoStepFailed: it does not hold.
        """
        self._add(actor, text, Mood.HELD if holds else Mood.FAILED)
        if not holds:
            raise DemoStepFailed(f"this should have held: {text}")

    def _add(self, actor: str, text: str, mood: Mood) -> None:
        moment = Moment(self.elapsed, actor, text, mood)
        self.moments.append(moment)
        self._show(moment)
