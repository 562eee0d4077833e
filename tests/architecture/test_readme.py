"""The commands in these documents work, as typed, in the order they stand."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from support import repository
from support.console import Block, Typist, blocks, matches

DOCUMENTS = ["README.md", "docs/quickstart.md", "docs/revocation.md"]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tested_commands_work(document: str, tmp_path: Path) -> None:
    tested = [
        command
        for block in blocks((repository.ROOT / document).read_text())
        if block.tested
        for command in block.commands
    ]
    assert tested
    home = tmp_path / "home"
    home.mkdir()
    folder = tmp_path / "work"
    folder.mkdir()
    typist = Typist(
        folder,
        {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
            "LANG": "C.UTF-8",
            "COLUMNS": "100",
        },
    )
    try:
        for command in tested:
            typist.type(command)
    finally:
        typist.close()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_block_is_tested_or_is_only_make(document: str) -> None:
    """`make demo` and its kin are run by .ci/run itself."""
    makefile = (repository.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for block in blocks((repository.ROOT / document).read_text()):
        if block.tested:
            continue
        for command in block.commands:
            words = command.text.split()
            assert words[:2] == [".", ".venv/bin/activate"] or (
                words[0] == "make" and words[1] in targets
            ), f"tag it <!-- tested -->: {command.text}"


def test_blocks_are_read_as_written() -> None:
    document = (
        "<!-- tested -->\n```console\n$ echo a \\\n> b\na b\n$ true\n```\n```console\n$ make\n```\n"
    )
    first, second = blocks(document)
    assert isinstance(first, Block)
    assert first.tested
    assert [(c.text, c.printed) for c in first.commands] == [("echo a \\\nb", "a b"), ("true", "")]
    assert not second.tested


def test_a_wrong_output_or_exit_code_is_noticed(tmp_path: Path) -> None:
    (block,) = blocks("<!-- tested -->\n```console\n$ x=1\n$ echo $x\n2\n$ false\n```\n")
    typist = Typist(tmp_path, {"PATH": os.defpath})
    typist.type(block.commands[0])
    with pytest.raises(AssertionError, match="the document says"):
        typist.type(block.commands[1])
    with pytest.raises(AssertionError):
        typist.type(block.commands[2])


def test_an_ellipsis_stands_for_anything() -> None:
    assert matches("serial …  active", "serial 0a1b active\n")
    assert not matches("serial … active", "serial 0a1b revoked")
