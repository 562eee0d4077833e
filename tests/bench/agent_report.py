"""The agent's rows of the table."""

from __future__ import annotations

from collections.abc import Sequence

from bench.agent_calls import BARE, BARE_UNARY, JWT, OURS, Cold, Warm
from bench.agent_life import AgentFootprint, AgentStart
from bench.agent_push import Push
from bench.agent_rotation import Rotation
from bench.agent_rows import AgentResults
from bench.columns import columns, median
from bench.measured import Spread

MOST_PUSH_MS = 250.0
MOST_COLD_RATIO = 3.0
_TITLES = {
    "added": "entry created → second SVID in hand",
    "removed": "entry deleted → stream told",
    "first": "entry created → first SVID in hand (asks every 10 ms)",
    "to all": "entry of a group of all created → in hand",
    "all acknowledged": "  … → acknowledged by every agent",
}


def parts(found: AgentResults) -> list[str]:
    """One text for each row that was measured."""
    return [
        text
        for text in (
            _push(found.push),
            _cold(found.cold),
            _warm(found.warm),
            _footprints(found.footprints),
            _start(found.start),
            _rotation(found.rotation),
        )
        if text
    ]


def _times(spread: Spread) -> list[str]:
    values = (spread.p50, spread.p95, spread.p99, spread.longest)
    return [*(f"{value:.1f}" for value in values), str(spread.samples)]


def _verdict(*, holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _push(several: Sequence[Push]) -> str:
    if not several:
        return ""
    rows = []
    for push in several:
        for change, spread in push.changes.items():
            # The bound is of what concerns one process; the others show what fanning out costs.
            bound = change in {"added", "removed", "first"}
            rows.append(
                [
                    _TITLES[change],
                    f"{push.agents:,}",
                    *_times(spread),
                    f"≤ {MOST_PUSH_MS:g}" if bound else "–",
                    _verdict(holds=spread.p99 <= MOST_PUSH_MS) if bound else "",
                ]
            )
    head = ("agent: pushed, ms", "agents", "p50", "p95", "p99", "longest", "changes", "p99", "")
    notes = [
        f"\n  {push.agents:,} connected, nothing changes: the broker uses "
        f"{push.idle_cores:.2f} of a core."
        + (f" The others joined in {push.connect_seconds:.1f} s." if push.connect_seconds else "")
        for push in several
    ]
    return columns(head, rows) + "".join(notes)


def _cold(found: Cold | None) -> str:
    if found is None:
        return ""
    rows = [[name, *_times(spread)] for name, spread in found.calls.items()]
    head = ("agent: cold connect, ms", "p50", "p95", "p99", "longest", "calls")
    middle = median(found.ratios)
    return (
        columns(head, rows)
        + f"\n  {OURS} ÷ {BARE}: {middle:.2f} ({min(found.ratios):.2f} – {max(found.ratios):.2f}) "
        f"of medians, expected ≤ {MOST_COLD_RATIO:g}: {_verdict(holds=middle <= MOST_COLD_RATIO)}; "
        f"of 99th percentiles {found.tail_ratio:.2f}. Answers of {found.answer_bytes:,} bytes."
    )


def _warm(found: Warm | None) -> str:
    if found is None:
        return ""
    rows = [
        [
            f"{name}, cached" if name == JWT else name,
            f"{median(r.per_second for r in rounds):,.0f}",
            f"{min(r.per_second for r in rounds):,.0f} – {max(r.per_second for r in rounds):,.0f}",
            f"{median(r.server_cpu_us for r in rounds):,.0f}",
            f"{median(r.server_cores for r in rounds):.2f}",
            f"{median(r.generator_cores for r in rounds):.2f}",
        ]
        for name, rounds in found.calls.items()
    ]
    pairs = zip(found.calls[JWT], found.calls[BARE_UNARY], strict=True)
    share = median(ours.per_second / bare.per_second for ours, bare in pairs)
    head = (
        *("agent: calls a second, warm", "median", "lowest – highest"),
        *("server CPU µs each", "server cores", "generator cores"),
    )
    return (
        columns(head, rows)
        + f"\n  {JWT} ÷ {BARE_UNARY}: {share:.2f}. {found.at_once} at once on four connections, "
        f"answers of {found.answer_bytes:,} bytes."
    )


def _footprints(several: Sequence[AgentFootprint]) -> str:
    rows = [
        [
            f"{each.svids:,}",
            f"{each.rss_mib:,.0f}",
            f"{each.fill_seconds:.1f}",
            f"{each.fill_cpu_seconds:.1f}",
        ]
        for each in several
    ]
    head = ("agent: X.509-SVIDs held", "RSS MiB", "s from start", "CPU s")
    return columns(head, rows) if rows else ""


def _start(found: AgentStart | None) -> str:
    if found is None:
        return ""
    rows = [
        ["process start → first SVID served", f"{found.first_svid * 1000:,.0f}"],
        ["  longest", f"{found.longest * 1000:,.0f}"],
        ["  of it: until the socket is there", f"{found.accepting * 1000:,.0f}"],
        ["  of that: Python and its imports", f"{found.imports * 1000:,.0f}"],
        ["  of that: Python alone", f"{found.interpreter * 1000:,.0f}"],
    ]
    return columns((f"agent: start, median of {found.starts}", "ms"), rows)


def _rotation(found: Rotation | None) -> str:
    if found is None:
        return ""
    rows = [[name, *_times(spread)] for name, spread in found.spreads.items()]
    rows += [[name, why, "", "", "", ""] for name, why in found.missing.items()]
    head = ("agent: rotation, ms", "p50", "p95", "p99", "longest", "rotations")
    return columns(head, rows)
