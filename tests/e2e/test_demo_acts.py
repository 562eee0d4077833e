"""The demonstration, whole: `idb demo` with a real OpenBao, real services and a real intruder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from identity_broker.dev.demo.timeline import Moment, Mood, Timeline
from identity_broker.dev.errors import DemoStepFailed
from identity_broker.dev.lifeline import tied_to_parent
from support.broker import run_idb

DEMO_SECONDS = 115


def processes_of(folder: Path) -> list[str]:
    """The command lines of all processes that name `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):
            continue
        if str(folder) in command:
            found.append(command.replace("\0", " "))
    return found


@pytest.mark.openbao
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_every_step_of_the_demonstration_holds(tmp_path: Path) -> None:
    kept = tmp_path / "demo"
    done = run_idb("demo", "--keep", str(kept), "-o", "json", timeout=DEMO_SECONDS)
    assert done.code == 0, done.err
    outcome = done.json
    assert outcome["held"] is True
    assert outcome["orders_failed"] == 0
    assert outcome["orders_placed"] > 50
    assert min(outcome["rotations"].values()) >= 2
    assert outcome["revoked"] >= 1
    for connection in ("open", "new"):
        refused = outcome[f"refused_{connection}_connection_after_commit_seconds"]
        assert refused < 5.0
    assert outcome["verifiers_acknowledged"] >= 2
    assert processes_of(kept) == []

    told = json.dumps(outcome["timeline"])
    for fact in (
        "whoever has the API key",
        "spiffe://shop.example/orders",
        "refused in the handshake",
        "PEER_REVOKED",
        "transit:",
    ):
        assert fact in told
    for file in kept.rglob("*"):
        if file.is_file() and file.suffix == ".log":
            assert "PRIVATE KEY" not in file.read_text(errors="replace")


def test_a_step_that_does_not_hold_ends_it() -> None:
    shown: list[Moment] = []
    timeline = Timeline(shown.append)
    timeline.act("Act")
    timeline.step("a", "fine", holds=True)
    with pytest.raises(DemoStepFailed, match="not fine"):
        timeline.step("a", "not fine", holds=False)
    assert [moment.mood for moment in shown] == [Mood.ACT, Mood.HELD, Mood.FAILED]
    assert shown == timeline.moments


def test_a_demonstration_that_is_interrupted_leaves_nothing_running(tmp_path: Path) -> None:
    kept = tmp_path / "demo"
    with subprocess.Popen(
        [sys.executable, "-m", "identity_broker.cli.main", "demo", "--keep", str(kept)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
        text=True,
        preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "idb dev" in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert processes_of(kept) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_idb("demo", "--keep", str(tmp_path / "file" / "demo"))
    assert done.code == 6
    assert "reason: DEMO_STEP_FAILED" in done.err
