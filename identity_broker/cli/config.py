"""`idb config`: what a configuration says, and whether it can be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from identity_broker.cli.options import Invocation, parse_pair, pass_invocation
from identity_broker.cli.output import emit, facts, say
from identity_broker.cli.tree import IdbGroup

if TYPE_CHECKING:
    from identity_broker.config.settings import Settings

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file; without one, IDB_… variables and defaults alone.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    callback=parse_pair,
    help="Override one key, such as server.address=127.0.0.1:0; repeatable.",
)


@click.group(cls=IdbGroup)
def config() -> None:
    """Check and show a configuration."""


@config.command()
@config_option
@set_option
@pass_invocation
def check(invocation: Invocation, config_file: Path | None, overrides: dict[str, str]) -> None:
    """Check a configuration: every problem at once, never a value."""
    settings = load_checked(config_file, overrides)
    say("the configuration can be used")
    document = {"ok": True, "trust_domain": str(settings.server.trust_domain)}
    emit(invocation.output, document, lambda: "")


@config.command()
@config_option
@set_option
@pass_invocation
def show(invocation: Invocation, config_file: Path | None, overrides: dict[str, str]) -> None:
    """Show the values in effect, defaults included; secrets are masked."""
    from identity_broker.config.reference import masked
    from identity_broker.config.settings import Settings

    shown = masked(Settings.load(config_file, overrides))
    emit(invocation.output, shown, lambda: facts(list(shown.items())))


def load_checked(config_file: Path | None, overrides: dict[str, str]) -> Settings:
    """Read a configuration and every file it names.

    Raises:
        ConfigError: lists every problem.
    """
    from identity_broker.config.loading import unreadable_files
    from identity_broker.config.settings import Settings
    from identity_broker.errors import ConfigError

    settings = Settings.load(config_file, overrides)
    problems = tuple(f"{key}: {rule}" for key, rule in unreadable_files(settings))
    if problems:
        raise ConfigError("the configuration names files that cannot be used", problems=problems)
    return settings
