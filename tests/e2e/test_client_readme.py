"""The SDK's README is run, block by block, against a real broker."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from identity_api.broker.v1 import types_pb2
from support.agent import running_agent
from support.line import running, settings_in

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
ME = "spiffe://example.org/payments/api"


async def run_block(block: str, environment: dict[str, str], directory: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        block,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
        cwd=directory,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    assert len(BLOCKS) == 6
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        selector = types_pb2.Selector(type="join_token", value="name:n1")
        await broker.entry("/payments/api", "n1", selectors=[selector])
        token_file = tmp_path / "token"
        token_file.write_text(await broker.token("n1"))
        environment = {
            "IDENTITY_BROKER_ADDRESS": broker.addresses.address,
            "IDENTITY_BROKER_BOOTSTRAP_ADDRESS": broker.addresses.bootstrap_address,
            "IDENTITY_BROKER_TRUST_DOMAIN": "example.org",
            "IDENTITY_BROKER_BUNDLE_FILE": str(broker.settings.server.bundle_file),
            "IDENTITY_BROKER_JOIN_TOKEN_FILE": str(token_file),
            # Kept state: the token is spent by the first block, and the others do not need it.
            "IDENTITY_BROKER_STATE_DIR": str(tmp_path / "state"),
        }
        printed = [await run_block(block, environment, tmp_path) for block in BLOCKS[1:]]
    assert printed[0].startswith(f"{ME} until 20")
    assert printed[1] == f"{ME}\n"
    assert printed[2] == "200\n"
    assert printed[3].startswith(f"{ME} ")
    assert printed[4] == ""


async def test_the_block_for_an_agent_needs_one_variable(tmp_path: Path) -> None:
    (block,) = (one for one in BLOCKS if "from_workload_api" in one)
    assert block == BLOCKS[0]
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        mine = types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")
        await broker.entry("/payments/api", "machine", selectors=[mine])
        async with running_agent(broker, tmp_path / "agent") as agent:
            environment = {"SPIFFE_ENDPOINT_SOCKET": agent.workload_api}
            printed = await run_block(block, environment, tmp_path)
    assert printed.startswith(f"{ME} until 20")


def test_the_readme_names_every_variable_and_no_other() -> None:
    from identity_client.settings import ENVIRONMENT

    named = set(re.findall(r"IDENTITY_BROKER_[A-Z_]+", README.read_text("utf-8")))
    assert named == set(ENVIRONMENT)
