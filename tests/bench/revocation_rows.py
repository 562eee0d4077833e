"""Revocation, measured: which rows there are, how long each takes, and what they find.

- Each row says what it costs beside what: OCSP beside OpenBao's, lists beside shorter ones, the
  check of a call beside a check that looks nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import crl_build, ocsp, revocation_spread, sdk_revocation
from bench.agent_site import site
from bench.columns import columns
from bench.crl_build import ListCost
from bench.measured import Spread
from bench.ocsp import OcspResults
from bench.revocation_spread import Spreading, Whole

SPREAD, LISTS, OCSP, VERIFIER = NAMES = (
    "revocation spread",
    "revocation lists",
    "revocation ocsp",
    "revocation verifier",
)
MOST_LAST_MS = 1000.0
MOST_CHECK_US = 5.0


@dataclass(frozen=True)
class RevocationPlan:
    """How much of everything."""

    verifiers: tuple[int, ...] = (1, 1_000)
    revocations: int = 100
    credentials: int = 10_000
    lists: tuple[int, ...] = crl_build.SIZES
    ocsp_rounds: int = 4
    ocsp_seconds: float = 2.0
    ocsp_probe_seconds: float = 0.4
    denied: int = 100_000


QUICK = RevocationPlan(
    verifiers=(3,),
    revocations=3,
    credentials=600,
    lists=(100, 1_000),
    ocsp_rounds=1,
    ocsp_seconds=0.3,
    ocsp_probe_seconds=0.0,
    denied=1_000,
)


@dataclass
class RevocationResults:
    """What was found."""

    spreads: list[Spreading] = field(default_factory=list)
    whole: Whole | None = None
    lists: list[ListCost] = field(default_factory=list)
    ocsp: OcspResults | None = None
    verifier: sdk_revocation.VerifierCost | None = None

    @property
    def verified(self) -> int:
        """Answers looked at in full."""
        return self.ocsp.verified if self.ocsp is not None else 0

    def document(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def measure(
    plan: RevocationPlan, wanted: Collection[str], directory: Path, say: Callable[[str], None]
) -> RevocationResults:
    """Every row that is wanted."""
    found = RevocationResults()
    if SPREAD in wanted:
        for count in plan.verifiers:
            say(f"revocation: {count:,} verifiers told")
            with site(directory / f"revocation-{count}") as place:
                found.spreads.append(
                    revocation_spread.measure(place, count=count, samples=plan.revocations)
                )
        say(f"revocation: {plan.credentials:,} credentials of one identity")
        with site(directory / "revocation-whole") as place:
            found.whole = revocation_spread.measure_whole(place, plan.credentials)
    if LISTS in wanted:
        say("revocation: lists")
        found.lists = crl_build.rows(plan.lists)
    if OCSP in wanted:
        say("revocation: OCSP")
        found.ocsp = ocsp.measure(
            directory / "ocsp",
            rounds=plan.ocsp_rounds,
            seconds=plan.ocsp_seconds,
            probe_seconds=plan.ocsp_probe_seconds,
            say=say,
        )
    if VERIFIER in wanted:
        say("revocation: the check of a call, and a verifier's memory")
        found.verifier = sdk_revocation.measure(plan.denied)
    return found


# --- for people -----------------------------------------------------------------------------------

_TITLES = {
    "refused": "returned → an SDK refuses",
    "first": "returned → first verifier told",
    "last": "returned → last verifier told",
}


def parts(found: RevocationResults) -> list[str]:
    """One text for each row that was measured."""
    texts = (
        _spread(found.spreads, found.whole),
        _lists(found.lists),
        found.ocsp.table() if found.ocsp is not None else "",
        found.verifier.table(MOST_CHECK_US) if found.verifier is not None else "",
    )
    return [text for text in texts if text]


def _spread(several: list[Spreading], whole: Whole | None) -> str:
    if not several:
        return ""
    rows = []
    for each in several:
        for name, title in _TITLES.items():
            spread = each.after_return[name]
            bound = name == "last"
            rows.append(
                [
                    title,
                    f"{each.verifiers:,}",
                    *_times(spread),
                    f"≤ {MOST_LAST_MS:g}" if bound else "–",
                    _verdict(holds=spread.p99 <= MOST_LAST_MS) if bound else "",
                ]
            )
        for name in ("returned", "last"):
            title = "called → returned" if name == "returned" else "called → last verifier told"
            rows.append([title, f"{each.verifiers:,}", *_times(each.after_call[name]), "–", ""])
    head = ("revocation, ms", "verifiers", "p50", "p95", "p99", "longest", "times", "p99", "")
    text = columns(head, rows)
    if whole is not None:
        rate = whole.credentials / whole.seconds
        text += (
            f"\n  {whole.credentials:,} credentials of one identity: {whole.seconds:.2f} s from "
            f"call to return, {rate:,.0f} a second."
        )
    return text


def _times(spread: Spread) -> list[str]:
    values = (spread.p50, spread.p95, spread.p99, spread.longest)
    return [*(f"{value:.1f}" for value in values), str(spread.samples)]


def _verdict(*, holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _lists(several: list[ListCost]) -> str:
    rows = [
        [
            f"{each.entries:,}",
            f"{each.full_ms:,.2f}",
            f"{each.shard_ms:,.2f}",
            f"{each.delta_ms:,.2f}",
            f"{each.revoke_us:,.1f}",
            f"{each.news_ms:,.2f}",
            f"{each.octets:,}",
            f"{each.shard_octets:,}",
            f"{each.resident_octets:,.0f}",
        ]
        for each in several
    ]
    head = (
        *("revocation lists, CPU ms: entries", "full", "part", "delta", "one more, µs"),
        *("one more and its delta", "octets", "of a part", "memory each"),
    )
    return columns(head, rows) if rows else ""
