"""The API's files: the stubs are what protoc makes of them, and every comment says its part."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

from identity_broker import errors
from identity_broker.agent import rpc_status
from support import repository

PROTOS = repository.ROOT / "protos"
# Field numbers in descriptor.proto: how source info names what a comment belongs to.
_FILE_MESSAGE, _FILE_SERVICE = 4, 6
_MESSAGE_FIELD, _MESSAGE_NESTED, _MESSAGE_ONEOF = 2, 3, 8
_SERVICE_METHOD = 2
_PRESENCE = re.compile(r"^\s*(Required|Optional|Set by the broker)\b")
_REASON = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b|\bINTERNAL\b|\bUNAUTHENTICATED\b")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """Every .proto file with its comments."""
    out = tmp_path_factory.mktemp("protos") / "all.binpb"
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.glob("identity_api/**/*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"),
            *("--include_source_info", f"--descriptor_set_out={out}"),
            *sources,
        ],
        check=True,
    )
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {
        tuple(at.path): at.leading_comments or at.trailing_comments
        for at in file.source_code_info.location
    }


def messages(
    file: FileDescriptorProto,
) -> Iterator[tuple[tuple[int, ...], str, DescriptorProto]]:
    def below(
        path: tuple[int, ...], name: str, message: DescriptorProto
    ) -> Iterator[tuple[tuple[int, ...], str, DescriptorProto]]:
        if not message.options.map_entry:
            yield path, name, message
        for number, nested in enumerate(message.nested_type):
            yield from below((*path, _MESSAGE_NESTED, number), f"{name}.{nested.name}", nested)

    for number, message in enumerate(file.message_type):
        yield from below((_FILE_MESSAGE, number), message.name, message)


def rpcs(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """(Service.Method, comment)."""
    said = comments(file)
    service: ServiceDescriptorProto
    for number, service in enumerate(file.service):
        for index, method in enumerate(service.method):
            path = (_FILE_SERVICE, number, _SERVICE_METHOD, index)
            yield f"{service.name}.{method.name}", said.get(path, "")


def test_the_stubs_are_what_protoc_makes_of_the_files(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, PROTOS / "generate.py", "--out", tmp_path], check=True, capture_output=True
    )
    generated = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*")}
    committed = {
        p.relative_to(PROTOS): p.read_bytes()
        for p in (PROTOS / "identity_api").rglob("*_pb2*")
        if p.suffix in {".py", ".pyi"}
    }
    assert generated
    differing = {
        str(path)
        for path in generated.keys() | committed.keys()
        if generated.get(path) != committed.get(path)
    }
    assert not differing, f"run `make protos` and commit: {sorted(differing)}"


def test_the_distribution_asks_for_what_its_stubs_ask_for() -> None:
    """Generated code refuses to load below the versions that generated it."""
    project = tomllib.loads((PROTOS / "pyproject.toml").read_text())["project"]
    stub = (PROTOS / "identity_api/broker/v1/svid_pb2_grpc.py").read_text()
    grpc = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stub)
    protobuf = re.search(
        r"# Protobuf Python Version: ([\d.]+)",
        (PROTOS / "identity_api/broker/v1/svid_pb2.py").read_text(),
    )
    assert grpc
    assert protobuf
    assert project["dependencies"] == [f"grpcio>={grpc[1]}", f"protobuf>={protobuf[1]}"]


def test_package_folder_and_import_path_are_the_same(described: list[FileDescriptorProto]) -> None:
    assert described
    for file in described:
        assert file.package == ".".join(PurePosixPath(file.name).parent.parts)


def test_every_rpc_says_who_whether_again_and_which_reasons(
    described: list[FileDescriptorProto],
) -> None:
    silent = [
        f"{name}: no {word}"
        for file in described
        for name, comment in rpcs(file)
        for word in ("Callers:", "Retry:", "Reasons")
        if word not in comment
    ]
    assert not silent
    assert sum(len(list(rpcs(file))) for file in described) >= 20


def _leaves(root: type[errors.BrokerError]) -> Iterator[type[errors.BrokerError]]:
    yield root
    for child in root.__subclasses__():
        yield from _leaves(child)


def test_every_reason_that_an_rpc_names_exists(described: list[FileDescriptorProto]) -> None:
    known = {leaf.reason for leaf in _leaves(errors.BrokerError)}
    unknown = {
        f"{name}: {reason}"
        for file in described
        for name, comment in rpcs(file)
        for reason in _REASON.findall(comment[comment.index("Reasons") :])
        if reason not in known
    }
    assert not unknown


def _table_of_the_workload_api() -> dict[str, str]:
    """Reason → code, as the agent's module says it: the standard's .proto is not ours to write."""
    return dict(
        re.findall(r"^    ([A-Z_]+)  +([A-Za-z]+)  ", rpc_status.__doc__ or "", re.MULTILINE)
    )


def test_the_reasons_of_the_workload_api_exist_and_have_the_code_they_are_said_to_have() -> None:
    by_reason = {leaf.reason: leaf for leaf in _leaves(errors.BrokerError)}
    said = _table_of_the_workload_api()
    assert len(said) >= 12
    for reason, code in said.items():
        name = rpc_status.status_code(by_reason[reason]()).name
        assert name.replace("_", "").lower() == code.lower(), reason


def test_every_reason_that_the_broker_gives_is_named_by_an_rpc() -> None:
    """A client learns from the .proto files what to expect, and from nowhere else.

    But for the Workload API, which is not ours: its reasons stand in a table in the agent.
    """
    written = "".join(p.read_text("utf-8") for p in PROTOS.glob("identity_api/**/*.proto"))
    named = {
        reason for comment in re.findall(r"// .*", written) for reason in _REASON.findall(comment)
    }
    named |= _table_of_the_workload_api().keys()
    leaves = (leaf for leaf in _leaves(errors.BrokerError) if not leaf.__subclasses__())
    silent = {leaf.reason for leaf in leaves if leaf.__module__ == errors.__name__} - named
    # The first never crosses the wire; the second is grpc.health.v1's.
    assert silent == {"CONFIG_INVALID", "SERVICE_NOT_FOUND"}


def test_every_field_says_whether_it_is_required(described: list[FileDescriptorProto]) -> None:
    silent = []
    for file in described:
        said = comments(file)
        for path, name, message in messages(file):
            for index, field in enumerate(message.field):
                comment = said.get((*path, _MESSAGE_FIELD, index), "")
                if field.HasField("oneof_index") and not field.proto3_optional:
                    # What is required is the choice, and that is said where it starts.
                    comment = said.get((*path, _MESSAGE_ONEOF, field.oneof_index), "")
                if not _PRESENCE.search(comment):
                    silent.append(f"{file.name}: {name}.{field.name}")
    assert not silent
