"""THE table is complete, and says what the protocol files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from identity_api.broker.v1 import (
    authority_pb2,
    bundle_pb2,
    credential_pb2,
    entry_pb2,
    node_attestation_pb2,
    node_pb2,
    node_sync_pb2,
    revocation_feed_pb2,
    revocation_pb2,
    svid_pb2,
)
from identity_broker.domain.caller import CallerClass
from identity_broker.server.rpc.methods import METHODS, AuditLevel

FILES = (
    *(authority_pb2, bundle_pb2, credential_pb2, entry_pb2),
    *(node_attestation_pb2, node_pb2, node_sync_pb2, svid_pb2),
    *(revocation_feed_pb2, revocation_pb2),
)
PROTOS = Path(__file__).parents[2] / "protos/identity_api/broker/v1"
_RPC = re.compile(r"((?:[ ]*//[^\n]*\n)+)[ ]*rpc (\w+)\(")
_CALLERS = re.compile(r"Callers: ([a-z, ]+)[.;]")


def described() -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for module in (*FILES, health_pb2, reflection_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_every_described_method_has_a_row_and_every_row_a_method() -> None:
    assert set(METHODS) == described()


def test_no_protocol_file_is_forgotten() -> None:
    with_services = {p.stem for p in PROTOS.glob("*.proto") if "service " in p.read_text("utf-8")}
    assert {Path(m.DESCRIPTOR.name).stem for m in FILES} == with_services


@pytest.mark.parametrize("path", sorted(PROTOS.glob("*.proto")), ids=lambda path: path.stem)
def test_callers_and_retries_are_those_the_protocol_names(path: Path) -> None:
    text = path.read_text("utf-8")
    service = re.search(r"^service (\w+)", text, re.MULTILINE)
    if service is None:
        return
    found = _RPC.findall(text)
    assert found
    for comment, method in found:
        row = METHODS[f"/identity_api.broker.v1.{service[1]}/{method}"]
        spoken = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
        callers = _CALLERS.search(spoken)
        assert callers, method
        assert row.callers == {CallerClass(name.strip()) for name in callers[1].split(",")}, method
        if row.idempotent:
            assert "Retry: safe" in spoken, method


def test_streams_alone_may_lack_a_deadline() -> None:
    pool = descriptor_pool.Default()
    for name, row in METHODS.items():
        service, _, method = name[1:].partition("/")
        streams = pool.FindServiceByName(service).methods_by_name[method].server_streaming
        assert streams or row.deadline is not None, name


def test_counted_fields_exist_and_every_batch_is_counted() -> None:
    pool = descriptor_pool.Default()
    for name, row in METHODS.items():
        service, _, method = name[1:].partition("/")
        fields = pool.FindServiceByName(service).methods_by_name[method].input_type.fields_by_name
        if row.counted:
            assert fields[row.counted].is_repeated, name
        assert bool(row.counted) == method.startswith("Batch"), name


def test_every_method_is_limited() -> None:
    assert all(row.rate is not None for row in METHODS.values())


def test_only_public_reads_go_unaudited() -> None:
    for name, row in METHODS.items():
        if row.audit is AuditLevel.NONE:
            assert row.callers == {CallerClass.ANYONE}, name
