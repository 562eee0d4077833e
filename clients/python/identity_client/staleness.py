"""What a verifier does when nothing is heard about revocations: warn, or refuse everybody.

    IdentitySource.from_env()             # IDENTITY_BROKER_REVOCATION_STALENESS=refuse:5m
    server_ssl_context(source, authorize=…, staleness=StalenessPolicy.refuse(300))

- Silence is counted on a clock that nobody sets and that runs on while the machine sleeps.
- An empty message counts as news: the feed sends one every few seconds.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Literal

from identity_client.errors import SettingsInvalid

__all__ = ["DEFAULT_STALENESS", "StalenessPolicy", "uptime"]

_TEXT = re.compile(r"(warn|refuse):([1-9][0-9]{0,8})(s|m|h|d)?", re.ASCII)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_BOOT_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def uptime() -> float:
    """Seconds on a clock that only runs forward, asleep or not."""
    return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)


@dataclass(frozen=True, slots=True)
class StalenessPolicy:
    """What silence means.

    Attributes:
        mode: "warn" writes one line and goes on with what is known; "refuse" accepts no peer.
        after: how much silence is tolerated.
        seconds: the same in seconds.
        refuses: whether peers are refused then.
    """

    mode: Literal["warn", "refuse"]
    after: timedelta
    seconds: float = field(init=False, repr=False)
    refuses: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in {"warn", "refuse"}:
            raise SettingsInvalid('a staleness policy is "warn" or "refuse"')
        if self.after <= timedelta(0):
            raise SettingsInvalid("a staleness policy needs a time longer than nothing")
        # Read for every call.
        object.__setattr__(self, "seconds", self.after.total_seconds())
        object.__setattr__(self, "refuses", self.mode == "refuse")

    @classmethod
    def warn(cls, after: timedelta | float) -> StalenessPolicy:
        """Go on with what is known, and say so.

        Args:
            after: a time span, or seconds.

        Raises:
            SettingsInvalid: it is not longer than nothing.
        """
        return cls("warn", _span(after))

    @classmethod
    def refuse(cls, after: timedelta | float) -> StalenessPolicy:
        """Accept no peer: handshakes and calls fail with REVOCATIONS_STALE.

        Args:
            after: a time span, or seconds. Heartbeats come every few seconds.

        Raises:
            SettingsInvalid: it is not longer than nothing.
        """
        return cls("refuse", _span(after))

    @classmethod
    def parse(cls, text: str) -> StalenessPolicy:
        """The policy that "warn:60s", "refuse:5m" or "refuse:300" names.

        Raises:
            SettingsInvalid: it names none.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise SettingsInvalid(
                "a staleness policy is written warn:TIME or refuse:TIME", hint='as in "refuse:5m"'
            )
        seconds = int(found[2]) * _UNITS[found[3] or "s"]
        return cls.refuse(seconds) if found[1] == "refuse" else cls.warn(seconds)

    def __str__(self) -> str:
        return f"{self.mode}:{self.seconds:g}s"


def _span(after: timedelta | float) -> timedelta:
    try:
        return after if isinstance(after, timedelta) else timedelta(seconds=after)
    except (OverflowError, ValueError) as exc:
        raise SettingsInvalid("a staleness policy's time is out of range") from exc


DEFAULT_STALENESS: Final = StalenessPolicy.warn(60)
