"""The results as one table and one JSON document.

- Ratios are taken within a round, between neighbours in time; their median is what counts.
- An expectation that does not hold is said so, in words; it is never a failure of the run.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import agent_report, revocation_rows
from bench.columns import columns, median
from bench.measured import Round

if TYPE_CHECKING:
    from bench.run import Results

LATENCY_OF = ("x509 single", "x509 batch", "jwt single", "openbao disk stored")
CEILING = "ceiling"
_CEILING_TITLE = "raw ceiling: CSR verify + sign, one core"
_CFSSL_TITLE = "cfssl sign, nothing stored"
_GENERATOR_HEADROOM = 1.5


# --- ratios ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """One contender's figure over another's, round by round.

    Attributes:
        expected: the least that is expected; None where nothing is.
        holds: whether the median reaches it.
    """

    name: str
    median: float
    low: float
    high: float
    expected: float | None
    holds: bool | None


def _speed(of: Round) -> float:
    return of.per_second


def _thrift(of: Round) -> float:
    """Credentials for a second of CPU: what a busy machine does not change."""
    return 1.0 / of.server_cpu_us if of.server_cpu_us else math.nan


_RATIOS: tuple[tuple[str, str, str, Callable[[Round], float], float | None], ...] = (
    ("single ÷ OpenBao stored, disk", "x509 single", "openbao disk stored", _speed, 0.8),
    ("single ÷ OpenBao stored, memory", "x509 single", "openbao memory stored", _speed, 0.8),
    ("batch ÷ OpenBao stored, disk", "x509 batch", "openbao disk stored", _speed, 2.0),
    ("batch ÷ OpenBao stored, memory", "x509 batch", "openbao memory stored", _speed, 2.0),
    ("batch ÷ raw ceiling", "x509 batch", CEILING, _speed, 0.5),
    ("single ÷ raw ceiling", "x509 single", CEILING, _speed, None),
    ("single ÷ OpenBao unstored, memory", "x509 single", "openbao memory unstored", _speed, None),
    ("batch ÷ OpenBao unstored, memory", "x509 batch", "openbao memory unstored", _speed, None),
    ("single ÷ cfssl", "x509 single", "cfssl", _speed, None),
    ("batch ÷ cfssl", "x509 batch", "cfssl", _speed, None),
    ("per CPU second: single ÷ OpenBao stored, disk", "x509 single", "openbao disk stored",
     _thrift, None),
    ("per CPU second: batch ÷ OpenBao stored, disk", "x509 batch", "openbao disk stored",
     _thrift, None),
    ("per CPU second: batch ÷ raw ceiling", "x509 batch", CEILING, _thrift, None),
    ("per CPU second: single ÷ raw ceiling", "x509 single", CEILING, _thrift, None),
    ("generator: no-op calls ÷ single calls", "no-op", "x509 single", _speed,
     _GENERATOR_HEADROOM),
)  # fmt: skip


def ratios(results: Results) -> list[Ratio]:
    """Those whose both sides were measured."""
    found = []
    for name, over, under, figure, expected in _RATIOS:
        pairs = zip(results.rounds.get(over, ()), results.rounds.get(under, ()), strict=False)
        values = [figure(a) / figure(b) for a, b in pairs if figure(b)]
        if values:
            middle = median(values)
            holds = None if expected is None else middle >= expected
            found.append(Ratio(name, middle, min(values), max(values), expected, holds))
    return found


# --- the document ---------------------------------------------------------------------------------


def document(results: Results) -> dict[str, Any]:
    """Everything, for machines."""
    titles = {contender.name: contender.title for contender in results.lineup.contenders}
    return {
        "schema": 1,
        "plan": asdict(results.plan),
        "seconds": results.seconds,
        "machine": machine(results),
        "throughput": {
            name: {
                "title": titles.get(name, _CEILING_TITLE),
                "median_per_second": median(r.per_second for r in rounds),
                "concurrency": results.best.get(name, 1),
                "tried": results.levels.get(name, {}),
                "rounds": [asdict(each) for each in rounds],
            }
            for name, rounds in results.rounds.items()
        },
        "missing": results.lineup.missing,
        "ratios": [asdict(ratio) for ratio in ratios(results)],
        "latency_ms": {name: asdict(found) for name, found in results.latencies.items()},
        "memory": [asdict(each) for each in results.footprints],
        "parts_us": {part.name.strip(): asdict(part) for part in results.parts},
        "pipeline_us": results.pipeline,
        "agent": results.agent.document(),
        "revocation": results.revocation.document(),
        "checks": {
            "answers_verified": results.verified,
            "credentials_received": results.received,
            "credentials_recorded": results.recorded,
        },
    }


def machine(results: Results) -> dict[str, Any]:
    """Where it was measured, and with what."""
    return {
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": results.load_before,
        "cryptography": version("cryptography"),
        "grpcio": version("grpcio"),
        **results.lineup.versions,
    }


def write(results: Results, path: Path) -> None:
    """The document, as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(document(results)), indent=2) + "\n")


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value


# --- the table ------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """All of it, for people."""
    parts = [
        _head(results),
        _throughput(results),
        _ratio_lines(results),
        _generator(results),
        _latency(results),
        _memory(results),
        _micro(results),
        *agent_report.parts(results.agent),
        *revocation_rows.parts(results.revocation),
        _checks(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(results: Results) -> str:
    where = machine(results)
    lines = [
        f"{where['cpus']} CPUs, {where['system']}, Python {where['python']}, "
        + ", ".join(
            f"{name} {where[name]}"
            for name in ("cryptography", "grpcio", "OpenBao", "cfssl")
            if name in where
        ),
        f"{results.plan.rounds} interleaved rounds of {results.plan.seconds:g} s each; "
        f"medians, and lowest – highest round; {results.seconds:.0f} s in all",
        "broker: one process, SQLite (WAL, synchronous=FULL), keys in memory, mTLS",
        "peers: HTTP/1.1 keep-alive without TLS; everybody: EC P-256",
    ]
    load, cpus = results.load_before, os.cpu_count() or 1
    if load > 0.3 * cpus:
        lines.append(
            f"CAUTION: the machine was busy (load {load:.1f} on {cpus} CPUs) before this began: "
            "the absolute figures are low"
        )
    return "\n".join(lines)


def _throughput(results: Results) -> str:
    if not results.rounds:
        return ""
    titles = {contender.name: contender.title for contender in results.lineup.contenders}
    rows = []
    for name in (*titles, CEILING):
        rounds = results.rounds.get(name)
        if not rounds:
            continue
        speeds = [each.per_second for each in rounds]
        rows.append(
            [
                titles.get(name, _CEILING_TITLE),
                f"{median(speeds):,.0f}",
                f"{min(speeds):,.0f} – {max(speeds):,.0f}",
                str(results.best.get(name, 1)),
                f"{median(r.server_cpu_us for r in rounds):,.0f}",
                f"{median(r.server_cores for r in rounds):.2f}",
                f"{median(r.generator_cores for r in rounds):.2f}" if name in titles else "–",
            ]
        )
    rows += [
        [_CFSSL_TITLE if name == "cfssl" else name, why, "", "", "", "", ""]
        for name, why in results.lineup.missing.items()
    ]
    head = (
        *("credentials a second", "median", "lowest – highest", "at once"),
        *("server CPU µs each", "server cores", "generator cores"),
    )
    return columns(head, rows)


def _ratio_lines(results: Results) -> str:
    rows = []
    for ratio in ratios(results):
        if ratio.expected is None:
            wanted, verdict = "–", ""
        else:
            wanted = f"≥ {ratio.expected:g}"
            verdict = "holds" if ratio.holds else "DOES NOT HOLD"
        rows.append(
            [
                ratio.name,
                f"{ratio.median:.2f}",
                f"{ratio.low:.2f} – {ratio.high:.2f}",
                wanted,
                verdict,
            ]
        )
    return (
        columns(("ratio", "median", "lowest – highest", "expected", "verdict"), rows)
        if rows
        else ""
    )


def _generator(results: Results) -> str:
    """Why the load generator is not the limit."""
    busiest = max(
        (
            (median(r.generator_cores for r in rounds), name)
            for name, rounds in results.rounds.items()
            if name != CEILING
        ),
        default=None,
    )
    if busiest is None:
        return ""
    share, name = busiest
    lines = [
        "The load generator is not the limit: one for all, it sends bytes made beforehand and",
        f"  looks at status and length; it used at most {share:.2f} of one core (with {name}).",
    ]
    single = results.rounds.get("x509 single")
    no_op = results.rounds.get("no-op")
    if single:
        cost = median(r.generator_us_per_call for r in single)
        lines.append(
            f"  A single call costs it {cost:.0f} µs of CPU: alone on a core it could make "
            f"{1e6 / cost:,.0f} a second; the broker answered "
            f"{median(r.per_second for r in single):,.0f}."
        )
    if single and no_op:
        lines.append(
            "  The same generator, connections and server, with a method that issues nothing (gRPC "
            f"health Check): {median(r.per_second for r in no_op):,.0f} calls a second."
        )
    return "\n".join(lines)


def _latency(results: Results) -> str:
    titles = {contender.name: contender.title for contender in results.lineup.contenders}
    rows = [
        [
            titles[name],
            f"{found.calls_per_second:,.0f}",
            f"{found.p50:.1f}",
            f"{found.p95:.1f}",
            f"{found.p99:.1f}",
            f"{found.longest:.1f}",
            str(found.calls),
        ]
        for name, found in results.latencies.items()
    ]
    if not rows:
        return ""
    head = ("latency at half load, ms", "calls/s", "p50", "p95", "p99", "longest", "calls")
    return (
        columns(head, rows)
        + "\n  Poisson arrivals drawn beforehand, answered or not; from when a call was due."
    )


def _memory(results: Results) -> str:
    rows = [
        [
            f"{found.entries:,}",
            f"{found.rss_mib:,.0f}",
            f"{found.start_seconds:.1f}",
            f"{found.cpu_seconds:.1f}",
        ]
        for found in results.footprints
    ]
    head = ("registration entries", "RSS MiB", "start s", "CPU s until ready")
    return columns(head, rows) if rows else ""


def _micro(results: Results) -> str:
    rows = [
        [part.name, f"{part.microseconds:,.0f}", f"{part.low:,.0f} – {part.high:,.0f}"]
        for part in results.parts
    ]
    if results.pipeline:
        bare, overhead = results.pipeline["bare"], results.pipeline["overhead"]
        rows += [
            ["unary call, mTLS, bare grpc.aio (and its client)", f"{bare:,.0f}", ""],
            ["  our pipeline, on top of it", f"{overhead:,.0f}", ""],
        ]
    if not rows:
        return ""
    return columns(("parts of one credential", "CPU µs", "lowest – highest"), rows)


def _checks(results: Results) -> str:
    lines = [f"{results.verified} answers were verified in full (signature, key, name)."]
    if results.received:
        lines.append(
            f"{results.received:,} credentials were received from the broker, "
            f"{results.recorded:,} stand in its ledger."
        )
    lines.append(
        "Expectations are of a quiet machine of two cores; the ratios travel, the rest not."
    )
    return "\n".join(lines)
