"""Node attestors of other packages: found by entry point, imported only when enabled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from identity_api.broker.v1 import node_attestation_pb2 as pb
from identity_api.broker.v1 import node_attestation_pb2_grpc
from identity_broker.attestors.node.plugins import AttestorContext, build_attestor
from identity_broker.domain.clock import SystemClock
from identity_broker.domain.node import JoinToken
from identity_broker.errors import ConfigError
from identity_ca.spiffe_id import TrustDomain
from support.line import csr_for, new_key, running, settings_in

SOURCE = """
from identity_broker.attestors.node.plugins import NodeAttestorPlugin
from identity_broker.domain import names
from identity_broker.domain.node import AttestedNode
from identity_broker.errors import AttestationFailed


class Rack:
    name = "rack"

    def __init__(self, trust_domain, word):
        self.trust_domain, self.word = trust_domain, word

    async def attest(self, evidence, challenge):
        if await challenge(b"the word?") != self.word:
            raise AttestationFailed
        node = names.node_id(self.trust_domain, self.name, evidence.payload.decode())
        return AttestedNode(node, self.name, frozenset(), reattestable=True)

    async def give_back(self, payload):
        pass


PLUGIN = NodeAttestorPlugin(
    "rack", lambda context, table: Rack(context.trust_domain, table["word"].encode())
)
NOT_A_PLUGIN = object()
"""


def _install(site: Path, package: str, entries: dict[str, str]) -> None:
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[identity_broker.node_attestors]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "rack_attestor.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("rack_attestor", None)


def _build(name: str, **table: str) -> object:
    async def consume(_: str) -> JoinToken:
        raise AssertionError("no token is asked for")

    async def release(_: str) -> None: ...

    context = AttestorContext(TrustDomain.parse("example.org"), SystemClock(), consume, release)
    return build_attestor(name, context, table)


async def test_a_plugin_attests_a_node_over_the_wire(site: Path, tmp_path: Path) -> None:
    _install(site, "rack", {"rack": "rack_attestor:PLUGIN"})
    settings = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        attestors={"plugins": {"rack": {"word": "open sesame"}}},
    )
    async with running(settings) as broker:
        stub = node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap())
        call = stub.Attest()
        begin = pb.AttestRequest.Begin(attestor="rack", payload=b"r7", csr=csr_for(new_key()))
        await call.write(pb.AttestRequest(begin=begin))
        await call.read()
        await call.write(pb.AttestRequest(challenge_response=b"open sesame"))
        answer = await call.read()
        assert isinstance(answer, pb.AttestResponse)
        assert answer.result.svid.spiffe_id == "spiffe://example.org/idb/node/rack/r7"


def test_an_installed_plugin_that_is_not_enabled_is_not_imported(site: Path) -> None:
    _install(site, "rack", {"rack": "rack_attestor:PLUGIN"})
    _build("join_token")
    assert "rack_attestor" not in sys.modules


@pytest.mark.parametrize(
    ("entries", "name", "says"),
    [
        ({}, "rack", "no installed package"),
        ({"rack": "rack_attestor:MISSING"}, "rack", "cannot be loaded"),
        ({"rack": "nowhere_to_be_found:PLUGIN"}, "rack", "cannot be loaded"),
        ({"rack": "rack_attestor:NOT_A_PLUGIN"}, "rack", "is not a NodeAttestorPlugin"),
        ({"shelf": "rack_attestor:PLUGIN"}, "shelf", "calls itself"),
        ({"join_token": "rack_attestor:PLUGIN"}, "join_token", "built in"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    site: Path, entries: dict[str, str], name: str, says: str
) -> None:
    _install(site, "rack", entries)
    with pytest.raises(ConfigError) as refused:
        _build(name, word="x")
    assert says in refused.value.public


def test_two_providers_of_one_name_are_refused(site: Path) -> None:
    _install(site, "rack", {"rack": "rack_attestor:PLUGIN"})
    _install(site, "other", {"rack": "rack_attestor:NOT_A_PLUGIN"})
    with pytest.raises(ConfigError) as refused:
        _build("rack", word="x")
    assert "several" in refused.value.public
