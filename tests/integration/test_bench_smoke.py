"""`make bench` runs: a small line-up, for seconds. What it measures is not looked at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support import repository

RUN = repository.ROOT / "tests" / "bench" / "run.py"


def run_bench(
    out: Path, *names: str, path: str | None = None, seconds: float = 90
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), "--out", str(out), "--only", *names],
        env={**os.environ, "BENCH_QUICK": "1", **({} if path is None else {"PATH": path})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.mark.slow
def test_measures_the_broker_and_says_how_it_compares(tmp_path: Path) -> None:
    names = ["x509 single", "x509 batch", "jwt single", "no-op", "ceiling"]
    if shutil.which("cfssl") is not None:
        names.append("cfssl")
    done = run_bench(tmp_path / "results.json", *names, "latency")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())

    for name in names:
        assert found["throughput"][name]["median_per_second"] > 0, name
    ratios = {ratio["name"]: ratio for ratio in found["ratios"]}
    assert ratios["batch ÷ raw ceiling"]["expected"] == 0.5
    assert ratios["batch ÷ raw ceiling"]["holds"] in {True, False}
    assert found["latency_ms"]["x509 single"]["p50"] > 0
    # Answers were looked at, and nothing was handed out that the ledger does not know.
    checks = found["checks"]
    assert checks["answers_verified"] >= 5
    assert checks["credentials_recorded"] >= checks["credentials_received"] > 0
    for line in ("broker, X.509, batches of 100", "batch ÷ raw ceiling", "load generator"):
        assert line in done.stdout
    # It cleans up: no data, no process.
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    marker = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if marker in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    return list(process.info["cmdline"] or ())


def test_says_that_cfssl_is_missing(tmp_path: Path) -> None:
    done = run_bench(tmp_path / "results.json", "cfssl", "ceiling", path=os.devnull)
    assert done.returncode == 0, done.stderr
    assert "not installed: apt-get install golang-cfssl" in done.stdout
    assert "cfssl" not in json.loads((tmp_path / "results.json").read_text())["throughput"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_measures_the_agent(tmp_path: Path) -> None:
    names = ["push", "fetch", "jwt", "memory", "start", "rotation"]
    done = run_bench(tmp_path / "results.json", *(f"agent {name}" for name in names), seconds=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["agent"]

    alone, among_others = found["push"]
    assert (alone["agents"], among_others["agents"]) == (1, 10)
    assert alone["changes"].keys() == {"added", "removed", "first"}
    assert among_others["changes"].keys() == {
        *("added", "removed", "first"),
        *("to all", "all acknowledged"),
    }
    assert all(
        0 < spread["p50"] <= spread["p99"]
        for push in found["push"]
        for spread in push["changes"].values()
    )
    assert alone["verified"] >= 1
    assert found["cold"]["ratios"][0] > 0
    assert found["cold"]["answer_bytes"] > 500
    assert found["warm"]["calls"]["FetchJWTSVID"][0]["per_second"] > 0
    assert [each["svids"] for each in found["footprints"]] == [20]
    start = found["start"]
    assert start["interpreter"] < start["imports"] < start["first_svid"]
    assert len(found["rotation"]["spreads"]) == 3
    assert found["rotation"]["missing"] == {}
    for line in ("first SVID in hand", "agent: cold connect, ms", "FetchJWTSVID, cached"):
        assert line in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_measures_revocation(tmp_path: Path) -> None:
    names = ["spread", "lists", "ocsp", "verifier"]
    done = run_bench(
        tmp_path / "results.json", *(f"revocation {name}" for name in names), seconds=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["revocation"]

    (spread,) = found["spreads"]
    assert spread["verifiers"] == 3
    for name in ("refused", "first", "last"):
        # Verifiers may be told before the command has returned, never before it was called.
        assert 0 < spread["after_call"][name]["p50"] < 60_000
    assert spread["after_return"]["first"]["p50"] <= spread["after_return"]["last"]["p50"]
    assert found["whole"]["credentials"] == 600
    short, long = found["lists"]
    assert 0 < short["octets"] < long["octets"]
    assert long["delta_ms"] > 0
    assert len(found["ocsp"]["rounds"]) == 3
    assert found["ocsp"]["verified"] >= 3
    for line in ("returned → last verifier told", "OpenBao pki/ocsp", "check of a call"):
        assert line in done.stdout
