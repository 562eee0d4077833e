"""What the documents say is there, is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import repository

DOCUMENTS = [
    path
    for path in repository.files()
    if path.suffix == ".md" and not path.is_relative_to(repository.ROOT / "docs" / "reference")
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
# `identity_broker/lifecycle/issue.py`, `.ci/run`, `docs/adr/`: a path from the top.
PATH = re.compile(
    r"`((?:identity_broker|identity_ca|identity_client|identity_api|protos|ca|clients|tests|deploy"
    r"|docs|\.ci)/[\w./-]*)`"
)
ADR = repository.ROOT / "docs" / "adr"


def name_of(path: Path) -> str:
    return repository.relative(path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    broken = [
        target
        for target in LINK.findall(document.read_text())
        if "://" not in target
        and not target.startswith("mailto:")
        and not (document.parent / target).exists()
    ]
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_exist(document: Path) -> None:
    """Within a distribution's own README, paths may start at the distribution."""
    roots = [repository.ROOT, document.parent, *(p.parent for p in repository.PACKAGES.values())]
    missing = [
        path
        for path in PATH.findall(document.read_text())
        if not any((root / path).exists() for root in roots)
    ]
    assert not missing


def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, repository.ROOT / ".ci" / "generate_docs.py", "--out", tmp_path],
        check=True,
    )
    reference = repository.ROOT / "docs" / "reference"
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in reference.iterdir()}
    assert made
    differing = sorted(n for n in made.keys() | kept.keys() if made.get(n) != kept.get(n))
    assert not differing, "run `make docs` and commit"


def test_decisions_are_numbered_and_listed() -> None:
    """Short MADR: status, context, decision, what was rejected, what follows."""
    decisions = sorted(path for path in ADR.glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    index = (ADR / "README.md").read_text()
    for path in decisions:
        text = path.read_text()
        title = text.splitlines()[0]
        assert title.startswith(f"# {path.name[:4]} "), path.name
        assert f"[{title.removeprefix('# ')}]({path.name})" in index, path.name
        for heading in ("Status:", "## Context", "## Decision", "## Rejected", "## Consequences"):
            assert heading in text, f"{path.name}: {heading}"


def test_every_document_is_reachable_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [repository.ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in reached:
            continue
        reached.add(document)
        waiting += [
            (document.parent / target).resolve()
            for target in LINK.findall(document.read_text())
            if target.endswith(".md") and "://" not in target
        ]
    ours = {p for p in repository.files() if p.suffix == ".md"}
    assert ours <= reached, sorted(repository.relative(p) for p in ours - reached)
