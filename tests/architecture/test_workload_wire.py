"""py-spiffe's copy of the Workload API's messages has one door."""

from __future__ import annotations

import ast

from support import repository

DOOR = "clients/python/identity_client/_wire/workload.py"
PRIVATE = "spiffe._proto"


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_exactly_one_module_imports_the_workload_api_messages() -> None:
    importers = []
    for path in repository.files():
        if path.suffix != ".py":
            continue
        names = _imports(ast.parse(path.read_text(encoding="utf-8")))
        if any(name == PRIVATE or name.startswith(f"{PRIVATE}.") for name in names):
            importers.append(repository.relative(path))
    assert importers == [DOOR]
