"""Every clause of the SPIFFE documents that this product answers for is carried by a test.

- A test carries a clause by wearing `@pytest.mark.clause("X-12")`; its name is not enough.
- Read from the source: a marker on anything that pytest does not collect carries nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from identity_api.broker.v1 import authority_pb2, credential_pb2
from identity_broker.domain.credential import CredentialKind
from identity_ca.authority import AuthorityKind
from support import repository

# SPIFFE-ID.md, X509-SVID.md, JWT-SVID.md, SPIFFE_Trust_Domain_and_Bundle.md: how many clauses each
# has that say something about an issuer, a validator or a bundle. SPIFFE_Workload_Endpoint.md and
# SPIFFE_Workload_API.md: about the agent that serves it and the client that asks.
CLAUSES = {
    f"{document}-{number}"
    for document, last in (("ID", 10), ("X", 15), ("J", 13), ("TB", 8), ("EP", 11), ("API", 20))
    for number in range(1, last + 1)
}


def collected_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """What pytest collects: functions named `test…`, of the module and of its `Test…` classes."""
    for node in tree.body:
        members = [node]
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            members = node.body
        for each in members:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name.startswith(
                "test"
            ):
                yield each


def clauses_of(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The clauses a test wears, unless it is skipped or expected to fail."""
    worn = [ast.unparse(each) for each in test.decorator_list]
    if any(each.startswith(("pytest.mark.skip", "pytest.mark.xfail")) for each in worn):
        return
    for decorator in test.decorator_list:
        if (
            isinstance(decorator, ast.Call)
            and ast.unparse(decorator.func) == "pytest.mark.clause"
            and len(decorator.args) == 1
            and not decorator.keywords
        ):
            yield str(ast.literal_eval(decorator.args[0]))


def carried() -> dict[str, list[str]]:
    """Clause to the tests that carry it."""
    found: dict[str, list[str]] = {}
    for path in repository.modules_of_tests():
        if not path.name.startswith("test_"):
            continue
        for test in collected_of(parsed(path)):
            for clause in clauses_of(test):
                found.setdefault(clause, []).append(f"{repository.relative(path)}::{test.name}")
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_clause_is_carried_by_a_test() -> None:
    missing = CLAUSES - carried().keys()
    assert not missing, f"no test carries {', '.join(sorted(missing))}"


def test_no_test_carries_a_clause_that_does_not_exist() -> None:
    """A typing mistake would otherwise take a clause away from one test without a word."""
    # Only of these documents: others may be added beside them.
    known = {clause.partition("-")[0] for clause in CLAUSES}
    strange = {
        clause: tests
        for clause, tests in carried().items()
        if clause.partition("-")[0] in known and clause not in CLAUSES
    }
    assert not strange


def test_a_test_named_after_a_clause_carries_it() -> None:
    """`test_x_12_…` says it is about X-12, so it wears X-12."""
    bare = []
    for path in repository.modules_of_tests():
        if not path.name.startswith("test_ca_"):
            continue
        for test in collected_of(parsed(path)):
            _, document, number, *_ = [*test.name.split("_"), "", ""]
            clause = f"{document.upper()}-{number}"
            if clause in CLAUSES and clause not in clauses_of(test):
                bare.append(f"{repository.relative(path)}::{test.name}")
    assert not bare


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('@pytest.mark.clause("X-1")\ndef test_a(): ...', ["X-1"]),
        ('@pytest.mark.clause("X-1")\nasync def test_a(): ...', ["X-1"]),
        (
            '@pytest.mark.clause("X-1")\n@pytest.mark.clause("J-2")\ndef test_a(): ...',
            ["X-1", "J-2"],
        ),
        ('class TestA:\n  @pytest.mark.clause("X-1")\n  def test_a(self): ...', ["X-1"]),
        ('class A:\n  @pytest.mark.clause("X-1")\n  def test_a(self): ...', []),
        ('@pytest.mark.clause("X-1")\ndef helper(): ...', []),
        ('@pytest.mark.skip\n@pytest.mark.clause("X-1")\ndef test_a(): ...', []),
        ('@pytest.mark.xfail(strict=True)\n@pytest.mark.clause("X-1")\ndef test_a(): ...', []),
        ('# @pytest.mark.clause("X-1")\ndef test_a(): ...', []),
        ("@pytest.mark.slow\ndef test_a(): ...", []),
    ],
)
def test_what_counts_as_carrying(source: str, expected: list[str]) -> None:
    assert [c for test in collected_of(ast.parse(source)) for c in clauses_of(test)] == expected


@pytest.mark.clause("ID-10")
def test_id_10_every_vocabulary_knows_two_kinds_of_document() -> None:
    """What a ledger, an authority or a message may be about: X.509 and JWT, nothing else."""
    assert {each.name for each in CredentialKind} == {"X509", "JWT"}
    assert {each.name for each in AuthorityKind} == {"X509", "JWT"}
    for enum, prefix in (
        (credential_pb2.CredentialKind, "CREDENTIAL_KIND_"),
        (authority_pb2.AuthorityKind, "AUTHORITY_KIND_"),
    ):
        names = {name.removeprefix(prefix) for name in enum.keys()}  # noqa: SIM118 - no mapping
        assert names == {"UNSPECIFIED", "X509", "JWT"}
