"""A question before something that cannot be taken back.

- It is asked on a terminal and nowhere else: where there is none, --yes has to say it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from identity_broker.cli.errors import UsageRefused
from identity_broker.cli.exit_codes import ExitCode
from identity_broker.cli.output import say

C = TypeVar("C", bound=Callable[..., Any])


def yes_option(function: C) -> C:
    """Add --yes."""
    return click.option("--yes", "-y", is_flag=True, help="Do not ask.")(function)


def can_ask() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def confirm(question: str, *, yes: bool, otherwise: str) -> None:
    """Return if the answer is yes.

    Args:
        yes: it was given on the command line.
        otherwise: what is said of any other answer, which ends the command.

    Raises:
        UsageRefused: nobody can be asked.
    """
    if yes:
        return
    if not can_ask():
        raise UsageRefused(
            "this asks first, and there is no terminal to ask on", hint="add --yes to do it"
        )
    if not click.confirm(question, err=True):
        say(otherwise)
        raise click.exceptions.Exit(ExitCode.INTERRUPTED)
