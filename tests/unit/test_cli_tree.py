"""The shape of `idb`: what it imports, what it lists, where its options may stand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from identity_broker.cli.main import cli
from identity_broker.cli.options import Invocation, SharedOption
from identity_broker.cli.output import OutputFormat
from identity_broker.cli.reference import reference_markdown
from identity_broker.cli.tree import IdbVerb

HEAVY = (
    "cryptography",
    "google.protobuf",
    "grpc",
    "hvac",
    "identity_client",
    "pydantic",
    "requests",
    "spiffe",
    "sqlalchemy",
    "starlette",
)


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        if isinstance(command, IdbVerb):
            yield " ".join(path), command
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = [leaf for name in cli.lazy for leaf in leaves(cli.load(name), (name,))]


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["no-such-command"]])
def test_the_way_to_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """Under 300 ms is what this is for; modules are counted because clocks of busy machines lie."""
    script = (
        "import sys\n"
        "from identity_broker.cli.main import run\n"
        f"run({arguments!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "print(sum(name.startswith('identity_broker.cli.') for name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *_, heavy, count = done.stdout.splitlines()
    assert heavy == "[]"
    assert int(count) < 12


@pytest.mark.parametrize("name", list(cli.lazy))
def test_the_list_says_what_the_command_says(name: str) -> None:
    command = cli.load(name)
    assert (command.help or "").splitlines()[0] == cli.lazy[name].summary
    assert command.name == name


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path for path, _ in COMMANDS])
def test_every_command_is_documented(path: str, command: click.Command) -> None:
    assert (command.help or "").strip()
    assert f"### idb {path}\n" in reference_markdown()
    names = [name for param in command.params for name in param.opts]
    assert "--output" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path for path, _ in COMMANDS])
def test_help_of_every_command_is_shown(path: str, command: click.Command) -> None:
    shown = CliRunner().invoke(cli, [*path.split(), "--help"], obj=Invocation())
    assert shown.exit_code == 0
    assert "Shared options:" in shown.stdout
    for param in command.params:
        if isinstance(param, SharedOption):
            assert param.opts[-1] in shown.stdout


def test_commands_of_the_product_are_all_there() -> None:
    wanted = {
        *("agent run", "agent status", "agent config check", "agent config show"),
        *("server run", "server check", "dev", "demo", "token generate", "version", "completion"),
        *(f"entry {verb}" for verb in ("create", "list", "show", "update", "delete")),
        *(f"node {verb}" for verb in ("list", "show", "ban", "evict")),
        *(f"svid {verb}" for verb in ("fetch", "show", "verify")),
        *("credential list", "credential show", "hold list", "hold lift", "compromised"),
        *("revoke", "revoke status", "revoke list", "revoke verify"),
        *("authority list", "authority show", "bundle show", "config check", "config show"),
        *("doctor", "explain", "envoy config"),
    }
    assert wanted == {path for path, _ in COMMANDS}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "json", "version"],
        ["version", "-o", "json"],
        ["--output=json", "version"],
        ["-o", "table", "version", "-o", "json"],
    ],
)
def test_output_may_stand_anywhere(arguments: list[str]) -> None:
    invocation = Invocation()
    shown = CliRunner().invoke(cli, arguments, obj=invocation)
    assert shown.exit_code == 0
    assert invocation.output is OutputFormat.JSON
    assert shown.stdout.startswith("{")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_idb(shell: str) -> None:
    shown = CliRunner().invoke(cli, ["completion", shell], obj=Invocation())
    assert shown.exit_code == 0
    assert "_IDB_COMPLETE" in shown.stdout
    assert "install:" in shown.stderr


def test_completion_completes_without_importing_commands() -> None:
    script = (
        "import sys\n"
        "from click.shell_completion import ShellComplete\n"
        "from identity_broker.cli.main import cli\n"
        "found = ShellComplete(cli, {}, 'idb', '_IDB_COMPLETE').get_completions([], 'c')\n"
        "print(sorted(item.value for item in found))\n"
        "print('identity_broker.cli.credential' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    names = ["completion", "compromised", "config", "credential"]
    assert done.stdout.splitlines() == [str(names), "False"]
