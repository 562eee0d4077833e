"""The commands in docs/envoy.md work, as typed, in the order they stand, with a real Envoy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support import repository
from support.console import Typist, blocks

DOCUMENT = repository.ROOT / "docs" / "envoy.md"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_commands_of_the_envoy_page_work(envoy: Path, open_directory: Path) -> None:
    found = blocks(DOCUMENT.read_text())
    assert found
    assert all(block.tested for block in found), "tag every console block <!-- tested -->"
    tools = open_directory / "tools"
    tools.mkdir()
    (tools / "envoy").symlink_to(envoy)
    folder = open_directory / "work"
    folder.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), str(tools), os.defpath])
    typist = Typist(
        folder,
        {"HOME": str(folder), "PATH": path, "LANG": "C.UTF-8", "COLUMNS": "100"},
    )
    try:
        for block in found:
            for command in block.commands:
                typist.type(command)
    finally:
        typist.close()
