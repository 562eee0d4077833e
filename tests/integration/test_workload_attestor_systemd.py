"""systemd: real processes in control groups laid out as systemd lays them out."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from identity_broker.attestors.workload.attestation import Attestation
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.attestors.workload.systemd import SystemdAttestor
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.localpeer.process import LiveProcess
from support.processes import Puppet, in_control_group

USER = "/user.slice/user-4242.slice/user@4242.service"


@pytest.mark.parametrize(
    ("group", "selectors"),
    [
        (
            "/idbtest.slice/idbtest-orders.service",
            {"systemd:id:idbtest-orders.service", "systemd:slice:idbtest.slice"},
        ),
        (
            "/idbtest.slice/idbtest-orders.service/workers/payments.service",
            {"systemd:id:idbtest-orders.service", "systemd:slice:idbtest.slice"},
        ),
        (
            f"{USER}/app.slice/payments.service",
            {
                "systemd:id:user@4242.service",
                "systemd:slice:user-4242.slice",
                "systemd:user_unit:payments.service",
            },
        ),
        ("/user.slice/user-4242.slice/session-9.scope", {"systemd:slice:user-4242.slice"}),
        ("/idbtest/orders.service", set()),
    ],
)
async def test_the_unit_is_the_one_systemd_made(group: str, selectors: set[str]) -> None:
    attestation = Attestation(build_attestors("systemd", {}))
    with Puppet() as puppet, in_control_group(group, puppet.pid):
        with closing(LiveProcess.of_pid(puppet.pid)) as process:
            found = await attestation.attest(process, {"systemd": frozenset({"id"})})
        assert {str(selector) for selector in found.selectors} == selectors
        assert found.problems == ()
        SelectorSyntax().check_all(found.selectors)
        puppet.kill()


async def test_whatever_this_process_is_in_makes_no_trouble() -> None:
    with closing(LiveProcess.of_pid(os.getpid())) as process:
        found = await SystemdAttestor().attest(process, wanted=frozenset())
    SelectorSyntax().check_all(found)
    assert {selector.type for selector in found} <= {"systemd"}
