"""The error tree is closed: unique reasons, documented classes, one status each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from identity_broker import errors
from identity_broker.errors import BrokerError, Kind
from identity_broker.server.rpc.status import abort_arguments, status_code
from support.rpc import leaves

ROOT = Path(__file__).parents[2]
ALL_LEAVES = leaves(BrokerError)
# `idb dev` and the CLI have errors of their own, which never cross the wire.
LEAVES = [leaf for leaf in ALL_LEAVES if leaf.__module__ == "identity_broker.errors"]


def test_reasons_are_unique_and_stable_in_form() -> None:
    reasons = [leaf.reason for leaf in ALL_LEAVES]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{2,47}", reason) for reason in reasons)


def test_the_server_s_errors_are_in_the_one_tree() -> None:
    elsewhere = {leaf.__module__ for leaf in ALL_LEAVES} - {"identity_broker.errors"}
    assert all(name.split(".")[1] in {"cli", "dev"} for name in elsewhere), elsewhere


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_documented_has_its_own_sentence_and_stands_in_the_tree(
    leaf: type[BrokerError],
) -> None:
    assert leaf.__name__ in (errors.__doc__ or "")
    assert leaf.__doc__
    assert leaf.sentence
    assert not leaf.sentence.endswith(".")
    if leaf is not errors.InvariantViolated:
        assert leaf.sentence != BrokerError.sentence
        assert leaf.reason != BrokerError.reason


def test_every_kind_has_a_status() -> None:
    for kind in Kind:
        error = BrokerError()
        error.kind = kind  # type: ignore[misc]
        assert status_code(error).value[0] > 0


def test_detail_and_fields_never_leave() -> None:
    error = errors.NodeBanned(detail="INTERNALS", path="INTERNALS")
    assert b"INTERNALS" not in repr(abort_arguments(error, "c")).encode()


def test_a_very_long_sentence_is_cut() -> None:
    code, message, trailers = abort_arguments(errors.MalformedRequest("x" * 100_000), "c")
    assert code is status_code(errors.MalformedRequest())
    assert len(message) == 1500
    assert len(trailers[0][1]) < 4096


def test_status_codes_are_named_in_one_file_of_each_server() -> None:
    naming = []
    for path in (ROOT / "identity_broker").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        if any(isinstance(n, ast.Attribute) and n.attr == "StatusCode" for n in ast.walk(tree)):
            naming.append(path.relative_to(ROOT / "identity_broker").as_posix())
    naming = [name for name in naming if not name.startswith(("cli/", "dev/"))]
    assert sorted(naming) == ["agent/rpc_status.py", "server/rpc/status.py"]


def test_reasons_in_the_protocol_files_exist() -> None:
    known = {leaf.reason for leaf in LEAVES}
    known |= {"INTERNAL", "SIGNING_BACKEND_UNAVAILABLE"}
    for path in (ROOT / "protos").rglob("*.proto"):
        for comment in re.findall(
            r"Reasons[^:]*:([^;]*?)\n\s*rpc ", path.read_text("utf-8"), re.DOTALL
        ):
            for word in re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", comment):
                assert word in known, f"{path.name}: {word}"
