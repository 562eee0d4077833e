"""`idb demo`: two services leave their shared API key, in three acts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import OutputFormat, Style, clean, emit, mark, paint
from identity_broker.cli.tree import IdbCommand

if TYPE_CHECKING:
    from identity_broker.dev.demo.timeline import Moment

_STYLES = {"command": Style.WARN, "failed": Style.BAD}


@click.command(cls=IdbCommand)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep what the demonstration made in DIR; a temporary directory if not given.",
)
@pass_invocation
def demo(invocation: Invocation, keep: Path | None) -> None:
    """Watch two services leave their shared API key.

    Three acts with real processes, a real OpenBao and real connections, in well under a minute:
    before, with identities, and an incident. Exit code 0 only if every step held.
    """
    from identity_broker.dev.demo.stage import run_demo

    def show(moment: Moment) -> None:
        if invocation.output is OutputFormat.TABLE:
            print(_line(moment), flush=True)

    outcome = run_demo(keep, show)
    emit(invocation.output, outcome, lambda: "")


def _line(moment: Moment) -> str:
    text = clean(moment.text)
    if moment.mood == "act":
        return f"\n{paint(text, Style.HEAD)}\n"
    if moment.mood == "next":
        return f"  {text}"
    symbol = " "
    if moment.mood in ("held", "failed"):
        symbol = mark(held=moment.mood == "held")
    style = _STYLES.get(moment.mood.value)
    text = paint(text, style) if style else text
    return f"{paint(f'{moment.elapsed:6.2f}', Style.DIM)}  {symbol} {moment.actor:<10}{text}"
