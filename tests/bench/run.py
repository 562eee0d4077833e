"""`make bench`: one broker against OpenBao, cfssl and the raw ceiling; one agent; one table.

    python tests/bench/run.py [--only NAME …] [--out FILE]

- Every contender is up the whole time; rounds are short and interleaved, their order rotated, so
  that a change of the machine's mood hits everybody. Ratios are taken round by round.
- Absolute figures are this machine's at this moment; the ratios are what is looked at.
- BENCH_QUICK=1: seconds instead of minutes, to see that everything works; the figures are noise.
- Exit code 0: measured, whatever the figures say. 1: something refused, or answered wrongly.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

if __name__ == "__main__":
    # gRPC's own handlers of a fork sometimes end a child before it becomes what it is to be.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # As a script, this folder comes first on the path; the modules are named from the one above.
    sys.path[0] = str(Path(__file__).parents[1])

import psutil

from bench import agent_rows, memory, micro, report, revocation_rows
from bench.agent_rows import AgentPlan, AgentResults
from bench.columns import median
from bench.contenders import ANY_CONCURRENCY, NAMES, Contender, LineUp, line_up
from bench.generator import Outcome, closed_loop, open_loop
from bench.measured import Latencies, Round
from bench.revocation_rows import RevocationPlan, RevocationResults

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".bench" / "results.json"
CEILING = "ceiling"
EXTRAS = ("memory", "micro", "latency", *agent_rows.NAMES, *revocation_rows.NAMES)


@dataclass(frozen=True)
class Plan:
    """How long everything takes."""

    rounds: int = 5
    seconds: float = 3.0
    warm_up: float = 0.3
    ceiling_seconds: float = 1.0
    probe_seconds: float = 0.7
    latency_seconds: float = 4.0
    entries: tuple[int, ...] = (0, 10_000, 100_000)
    micro_rounds: int = 7
    micro_calls: int = 300
    pipeline_rounds: int = 30
    agent: AgentPlan = field(default_factory=AgentPlan)
    revocation: RevocationPlan = field(default_factory=RevocationPlan)


QUICK = Plan(
    rounds=1,
    seconds=0.5,
    warm_up=0.1,
    ceiling_seconds=0.2,
    probe_seconds=0.0,
    latency_seconds=0.5,
    entries=(1_000,),
    micro_rounds=1,
    micro_calls=20,
    pipeline_rounds=4,
    agent=agent_rows.QUICK,
    revocation=revocation_rows.QUICK,
)


@dataclass
class Results:
    """Everything found out, for `report`."""

    plan: Plan
    lineup: LineUp
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    levels: dict[str, dict[int, float]] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)
    latencies: dict[str, Latencies] = field(default_factory=dict)
    footprints: list[memory.Footprint] = field(default_factory=list)
    parts: list[micro.Part] = field(default_factory=list)
    pipeline: dict[str, float] = field(default_factory=dict)
    agent: AgentResults = field(default_factory=AgentResults)
    revocation: RevocationResults = field(default_factory=RevocationResults)
    recorded: int = 0
    received: int = 0
    verified: int = 0
    load_before: float = 0.0
    seconds: float = 0.0


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure one broker against real peers.")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=(*NAMES, CEILING, *EXTRAS),
        help=f"of: {', '.join((*NAMES, CEILING, *EXTRAS))}",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    arguments = parser.parse_args()
    wanted = tuple(arguments.only or (*NAMES, CEILING, *EXTRAS))
    plan = QUICK if os.environ.get("BENCH_QUICK", "") not in {"", "0"} else Plan()
    signal.signal(signal.SIGTERM, _interrupt)
    with _directory(arguments.out.parent) as directory:
        results = measure(plan, wanted, directory)
    report.write(results, arguments.out)
    print(report.table(results))
    print(f"\nAll figures: {arguments.out}")
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: through every `finally`, so that every server is stopped."""
    raise KeyboardInterrupt


@contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    """A private one for all data, on the disk the checkout is on; gone afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(plan: Plan, wanted: tuple[str, ...], directory: Path) -> Results:
    """Everything that is wanted."""
    began = time.perf_counter()
    load = os.getloadavg()[0]
    with ExitStack() as resources:
        _say("starting what is measured")
        results = Results(plan, line_up(directory, resources, wanted), load_before=load)
        for name, why in results.lineup.missing.items():
            _say(f"{name}: {why}")
        _find_best_levels(results)
        _run_rounds(results, with_ceiling=CEILING in wanted)
        if "latency" in wanted:
            _run_latencies(results)
    _count_recorded(results)
    if "memory" in wanted:
        for entries in plan.entries:
            _say(f"memory with {entries:,} entries")
            results.footprints.append(memory.measure(directory / f"entries-{entries}", entries))
    if "micro" in wanted:
        _say("the parts of a credential")
        results.parts = micro.measure(
            directory / "micro", rounds=plan.micro_rounds, calls=plan.micro_calls
        )
        results.pipeline = micro.pipeline(plan.pipeline_rounds)
    results.agent = agent_rows.measure(plan.agent, wanted, directory, _say)
    results.revocation = revocation_rows.measure(plan.revocation, wanted, directory, _say)
    results.verified += results.agent.verified + results.revocation.verified
    results.seconds = time.perf_counter() - began
    return results


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- throughput -----------------------------------------------------------------------------------


def _find_best_levels(results: Results) -> None:
    """Each contender at the concurrency that suits it."""
    plan = results.plan
    for contender in results.lineup.contenders:
        levels = results.levels[contender.name] = {}
        if plan.probe_seconds:
            _say(f"{contender.title}: which concurrency")
            for level in contender.levels:
                outcome = _closed(contender, level, plan.probe_seconds, plan.warm_up, results)
                levels[level] = outcome.calls / outcome.seconds
            results.best[contender.name] = max(levels, key=levels.__getitem__)
        else:
            results.best[contender.name] = contender.levels[len(contender.levels) // 2]


def _run_rounds(results: Results, *, with_ceiling: bool) -> None:
    plan = results.plan
    ceiling = micro.Ceiling()
    order: list[Contender | None] = [*results.lineup.contenders]
    if with_ceiling:
        order.append(None)
    if not order:
        return
    for number in range(plan.rounds):
        _say(f"round {number + 1} of {plan.rounds}")
        turn = number * max(1, len(order) // plan.rounds) % max(1, len(order))
        for contender in order[turn:] + order[:turn]:
            if contender is None:
                rate, cpu = ceiling.run(plan.ceiling_seconds)
                results.rounds.setdefault(CEILING, []).append(Round(rate, rate, cpu, 1.0))
            else:
                results.rounds.setdefault(contender.name, []).append(_round(contender, results))


def _round(contender: Contender, results: Results) -> Round:
    plan = results.plan
    process = psutil.Process(contender.pid)
    cpu: list[float] = []

    def edge() -> None:
        times = process.cpu_times()
        cpu.append(times.user + times.system)

    outcome = closed_loop(
        lambda: contender.wires(results.best[contender.name]),
        requests=contender.requests,
        concurrency=results.best[contender.name],
        seconds=plan.seconds,
        warm_up=plan.warm_up,
        smallest=contender.smallest,
        on_edge=edge,
    )
    _verify(contender, outcome, results)
    per_call = max(1, contender.per_call)
    made = outcome.calls * per_call
    server = cpu[1] - cpu[0]
    return Round(
        per_second=made / outcome.seconds,
        calls_per_second=outcome.calls / outcome.seconds,
        server_cpu_us=server / made * 1e6 if made else 0.0,
        server_cores=server / outcome.seconds,
        generator_cores=outcome.cpu_seconds / outcome.seconds,
        generator_us_per_call=outcome.cpu_seconds / outcome.calls * 1e6 if outcome.calls else 0.0,
    )


def _closed(
    contender: Contender, level: int, seconds: float, warm_up: float, results: Results
) -> Outcome:
    outcome = closed_loop(
        lambda: contender.wires(level),
        requests=contender.requests,
        concurrency=level,
        seconds=seconds,
        warm_up=warm_up,
        smallest=contender.smallest,
    )
    _verify(contender, outcome, results)
    return outcome


def _verify(contender: Contender, outcome: Outcome, results: Results) -> None:
    subject = results.lineup.broker
    if subject is not None and contender.pid == subject.pid:
        results.received += outcome.received * contender.per_call
    for request, body in outcome.kept[:3]:
        contender.verify(request, body)
        results.verified += 1


def _count_recorded(results: Results) -> None:
    """What the ledger holds, once the broker has gone: nothing was handed out unrecorded."""
    subject = results.lineup.broker
    if subject is None:
        return
    with sqlite3.connect(f"file:{subject.database}?mode=ro", uri=True) as database:
        results.recorded = database.execute("SELECT count(*) FROM credentials").fetchone()[0]
    if results.recorded < results.received:
        raise AssertionError(
            f"{results.received} credentials were received and {results.recorded} are recorded"
        )


# --- latency --------------------------------------------------------------------------------------


def _run_latencies(results: Results) -> None:
    """At half of what each did at most."""
    for contender in results.lineup.contenders:
        if contender.name not in report.LATENCY_OF:
            continue
        calls = median(r.calls_per_second for r in results.rounds[contender.name])
        rate = calls / 2
        _say(f"{contender.title}: latency at {rate:.0f} calls/s")
        outcome = open_loop(
            partial(contender.wires, ANY_CONCURRENCY),
            requests=contender.requests,
            rate=rate,
            seconds=results.plan.latency_seconds,
            warm_up=results.plan.warm_up,
            smallest=contender.smallest,
        )
        _verify(contender, outcome, results)
        results.latencies[contender.name] = Latencies.of(
            rate, outcome.latencies, outcome.unanswered
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
