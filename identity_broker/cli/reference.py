"""The command line in Markdown, from the commands themselves: docs/reference/cli.md.

python -m identity_broker.cli.reference
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from identity_broker.cli.exit_codes import MEANINGS
from identity_broker.cli.main import cli
from identity_broker.cli.options import SharedOption
from identity_broker.cli.tree import Documented


def reference_markdown() -> str:
    """Every command with its options, the shared options once, and the exit codes."""
    lines = [
        "# The command line",
        "",
        "Generated from `identity_broker/cli/` by `make docs`; do not edit.",
        "",
        "`idb` is also installed as `identity-broker`. stdout is data, stderr is talk: what a "
        "command answers goes to stdout, as a table or (with `-o json`) as JSON with stable keys; "
        "everything said about it, errors included, goes to stderr. With `-o json` an error is "
        'one line, `{"error": {"message", "reason", "hint", "id", "exit_code"}}`. Colour appears '
        "on a terminal only, and never with `NO_COLOR` set.",
        "",
        "Which broker is meant: `--address`, `--socket` or `--dir`; else `IDB_ADMIN_SOCKET`, else "
        "`IDB_DIR`, else the one that `idb dev` runs in `.dev` below the working directory.",
        "",
        "Short names: where a SPIFFE ID is asked for, `/shop/orders` is that path in the broker's "
        "trust domain; where a node is asked for, `web-1` is the node that joined with a token of "
        "that name, `x509_pop/NAME` one of another attestor, and a parent of `broker` makes an "
        "entry that names a group of nodes.",
        "",
        *_shared(),
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| {int(code)} | {_cell(meaning)} |" for code, meaning in MEANINGS.items()),
    ]
    for title, commands in cli.sections.items():
        lines += ["", f"## {title}"]
        for name in commands:
            lines += _command(cli.load(name), f"idb {name}")
    return "\n".join(lines) + "\n"


def _shared() -> Iterator[str]:
    yield from ("## Options of every command", "", "They may stand before or after it.", "")
    options = [param for param in cli.params if isinstance(param, SharedOption)]
    yield from _options(options)
    yield ""


def _command(command: click.Command, path: str) -> Iterator[str]:
    children = command.commands if isinstance(command, click.Group) else {}
    if not children or isinstance(command, Documented):
        yield from _itself(command, path)
    for name, child in children.items():
        yield from _command(child, f"{path} {name}")


def _itself(command: click.Command, path: str) -> Iterator[str]:
    arguments = " ".join(
        param.make_metavar(click.Context(command))
        for param in command.params
        if isinstance(param, click.Argument)
    )
    yield from ("", f"### {path}", "", f"    {path} {arguments}".rstrip() + " [OPTIONS]", "")
    for paragraph in (command.help or "").split("\n\n"):
        yield from (" ".join(paragraph.split()), "")
    if command.epilog:
        yield from (command.epilog, "")
    own = [
        param
        for param in command.params
        if isinstance(param, click.Option) and not isinstance(param, SharedOption)
    ]
    if own:
        yield from _options(own)
    if isinstance(command, Documented) and command.examples:
        yield from ("", "```sh") if own else ("```sh",)
        yield from command.examples
        yield "```"


def _options(options: list[click.Option] | list[SharedOption]) -> Iterator[str]:
    yield from ("| option | meaning |", "|---|---|")
    for option in options:
        record = option.get_help_record(click.Context(cli))
        if record is not None:
            yield f"| `{_cell(record[0])}` | {_cell(record[1])} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference_markdown(), end="")
