"""Commands that hints and documents name are commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from identity_broker.cli.main import cli
from identity_client.admin._names import broker_server_name
from identity_client.naming import broker_id, parse_trust_domain, server_name
from support import repository

# `idb entry show e-42`, `idb --dir dev entry list`: after `idb`, its options, then words.
NAMED = re.compile(r"\bidb((?: --[a-z]+ [^\s`'\"]+)*) ([a-z]+)(?: ([a-z]+))?")
# Sentences in which "idb" is the subject and no command follows.
PROSE = {"failed", "is", "on", "has", "itself", "command", "was", "the", "to", "as", "with"}
SOURCES = [
    path
    for path in repository.files()
    if path.suffix in (".py", ".md", ".proto")
    and not path.is_relative_to(repository.ROOT / "tests")
]


def named(path: Path) -> set[tuple[str, str]]:
    return {(found[2], found[3] or "") for found in NAMED.finditer(path.read_text())}


@pytest.mark.parametrize("path", SOURCES, ids=repository.relative)
def test_named_commands_exist(path: Path) -> None:
    for noun, verb in named(path):
        if noun in PROSE:
            continue
        assert noun in cli.lazy, f"idb {noun}"
        command = cli.load(noun)
        if verb and isinstance(command, click.Group):
            assert verb in command.commands, f"idb {noun} {verb}"


@pytest.mark.parametrize("name", ["example.org", "a.b.c"])
def test_the_brokers_name_is_the_same_everywhere(name: str) -> None:
    assert broker_server_name(name) == server_name(broker_id(parse_trust_domain(name)))
