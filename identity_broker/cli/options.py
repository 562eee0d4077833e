"""The options every command takes, and the values options are written as.

- `-o` and the options that name a broker may stand before or after any command word; the last
  one wins.
- They are collected in one `Invocation`, the click context's `obj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import click

from identity_broker.cli.output import OutputFormat


@dataclass(slots=True)
class Invocation:
    """What the shared options said."""

    output: OutputFormat = OutputFormat.TABLE
    dir: Path | None = None
    socket: Path | None = None
    address: str | None = None
    cert: Path | None = None
    key: Path | None = None
    bundle: Path | None = None


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


class Duration(click.ParamType[timedelta]):
    """A duration such as 90s, 15m, 1h30m or 7d."""

    name = "duration"
    _FORM: ClassVar[re.Pattern[str]] = re.compile(
        r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})s)?", re.ASCII
    )

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        """Read the duration."""
        if isinstance(value, timedelta):
            return value
        match = self._FORM.fullmatch(value)
        if not match or not value:
            self.fail(f'"{value}" is not a duration; write it like 90s, 15m, 1h30m or 7d')
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        try:
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        except OverflowError:
            self.fail(f'"{value}" is longer than can be counted')


def parse_pair(
    ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, str]:
    """Read repeated KEY=VALUE options."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f'"{pair}" is not KEY=VALUE', ctx=ctx, param=param)
        found[key] = value
    return found


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is None or ctx.resilient_parsing:
        return
    invocation = ctx.ensure_object(Invocation)
    if param.name == "output":
        value = OutputFormat(value)
    setattr(invocation, param.name or "", value)


class SharedOption(click.Option):
    """An option that lands in the `Invocation`."""

    def __init__(self, *names: str, **attributes: Any) -> None:
        super().__init__(list(names), expose_value=False, callback=_store, **attributes)


def output_option(*, hidden: bool = False) -> SharedOption:
    """-o."""
    return SharedOption(
        "-o",
        "--output",
        type=click.Choice([item.value for item in OutputFormat]),
        help="What stdout is written as.",
        hidden=hidden,
    )


def dir_option(*, hidden: bool = False, text: str = "") -> SharedOption:
    """--dir."""
    return SharedOption(
        "--dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help=text or "The broker that `idb dev --dir DIR` runs [env: IDB_DIR].",
        hidden=hidden,
    )


def connection_options(*, hidden: bool = False) -> list[SharedOption]:
    """The options that say which broker is meant."""
    path: Callable[[], click.Path] = lambda: click.Path(path_type=Path)  # noqa: E731
    return [
        dir_option(hidden=hidden),
        SharedOption(
            "--socket",
            type=path(),
            metavar="PATH",
            hidden=hidden,
            help="The broker's admin socket [env: IDB_ADMIN_SOCKET].",
        ),
        SharedOption(
            "--address",
            metavar="HOST:PORT",
            hidden=hidden,
            help="The broker's mTLS port, with an admin's --cert, --key and --bundle.",
        ),
        SharedOption(
            "--cert", type=path(), metavar="FILE", hidden=hidden, help="X.509-SVID, PEM chain."
        ),
        SharedOption("--key", type=path(), metavar="FILE", hidden=hidden, help="Its key, PEM."),
        SharedOption(
            "--bundle",
            type=path(),
            metavar="FILE",
            hidden=hidden,
            help="The trust domain's bundle, PEM.",
        ),
    ]
