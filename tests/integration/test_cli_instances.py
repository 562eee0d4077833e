"""`idb credential` tells the instances of one workload apart."""

from __future__ import annotations

import asyncio
from pathlib import Path

from identity_api.broker.v1 import svid_pb2
from support.broker import Ran, run_idb
from support.line import RunningBroker, csr_for, new_key, running, settings_in


async def idb(broker: RunningBroker, *arguments: str) -> Ran:
    socket = str(broker.addresses.admin_socket)
    return await asyncio.to_thread(run_idb, "--socket", socket, *arguments)


async def test_instances_are_listed_shown_and_revoked_alone(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1", per_process=True)
        before = await idb(broker, "credential", "list")
        assert "INSTANCE" not in before.out  # a column for nothing
        items = [
            svid_pb2.BatchIssueX509Request.Item(
                entry_id=entry.id, csr=csr_for(new_key()), instance=instance
            )
            for instance in ("pid 41", "pid 42", "")
        ]
        answer = await node.svids.BatchIssueX509(svid_pb2.BatchIssueX509Request(items=items))
        serials = [result.svid.serial for result in answer.results]

        listed = await idb(broker, "credential", "list", "--entry", entry.id)
        lines = {line.split()[0]: line for line in listed.out.splitlines()}
        assert lines["ID"].endswith("INSTANCE")
        assert lines[serials[0]].endswith("pid 41")
        assert lines[serials[2]].endswith("-")
        shown = await idb(broker, "credential", "show", serials[1], "-o", "json")
        assert shown.json["instance"] == "pid 42"
        assert "pid 42" in (await idb(broker, "credential", "show", serials[1])).out

        revoked = await idb(broker, "revoke", "--serial", serials[0], "--yes", "-o", "json")
        assert revoked.json["revoked_ids"] == [serials[0]]
        left = await idb(broker, "credential", "list", "--state", "issued", "-o", "json")
        assert {one["instance"] for one in left.json["credentials"] if one["entry_id"]} == {
            "pid 42",
            "",
        }
