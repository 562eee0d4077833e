"""Commands and groups as `idb` has them: shared options everywhere, modules imported when used.

- `idb --help` imports no command: names and summaries of the top level stand in a table, and a
  test holds the table equal to the commands.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from identity_broker.cli.options import SharedOption, connection_options, output_option


class Documented(click.Command):
    """What can be run: it has the shared options, and examples that are shown as typed."""

    def __init__(
        self, *args: Any, connects: bool = False, examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        own = {name for param in self.params for name in param.opts}
        shared = [output_option(), *(connection_options() if connects else [])]
        self.params += [option for option in shared if not own.intersection(option.opts)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options first, then the shared ones."""
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for param in options:
            record = param.get_help_record(ctx)
            if record is not None:
                (shared if isinstance(param, SharedOption) else own).append(record)
        for title, records in (("Options", own), ("Shared options", shared)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are typed."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")


class IdbCommand(Documented):
    """A command; `connects` adds the options that name a broker."""


class IdbGroup(click.Group):
    """A group whose commands are `IdbCommand`s; it takes the shared options, unlisted."""

    command_class = IdbCommand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [output_option(hidden=True), *connection_options(hidden=True)]


class IdbVerb(Documented, click.Group):
    """A group that does something itself when no command of its own follows."""

    command_class = IdbCommand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, invoke_without_command=True, no_args_is_help=True, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a top-level command is defined: `identity_broker.cli.<module>:<attribute>`."""

    module: str
    attribute: str
    summary: str


class LazyGroup(click.Group):
    """The top level: sections of commands, each imported when it is used."""

    def __init__(
        self, *args: Any, sections: Mapping[str, Mapping[str, LazyCommand]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.lazy = {name: item for group in sections.values() for name, item in group.items()}
        self.params += [output_option(), *connection_options()]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in self.lazy:
            return None
        return self.load(cmd_name)

    def load(self, name: str) -> click.Command:
        """Import the command `name`."""
        item = self.lazy[name]
        module = importlib.import_module(f"identity_broker.cli.{item.module}")
        command = getattr(module, item.attribute)
        if not isinstance(command, click.Command):  # pragma: no cover - a test walks the table
            raise TypeError(f"{item.module}.{item.attribute} is not a command")
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name without importing one."""
        names = [
            CompletionItem(name, help=item.summary)
            for name, item in self.lazy.items()
            if name.startswith(incomplete)
        ]
        # click.Command completes options; click.Group would import every command on the way.
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections without importing a command."""
        width = max(map(len, self.lazy))
        for title, commands in self.sections.items():
            rows: Sequence[tuple[str, str]] = [
                (name.ljust(width), item.summary) for name, item in commands.items()
            ]
            with formatter.section(title):
                formatter.write_dl(rows)
