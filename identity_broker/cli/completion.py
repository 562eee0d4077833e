"""`idb completion`: a script that makes the shell complete `idb`.

- The script asks `idb` itself, so it never goes stale.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import emit, say
from identity_broker.cli.tree import IdbCommand

_INSTALL = {
    "bash": 'eval "$(idb completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(idb completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": "idb completion fish > ~/.config/fish/completions/idb.fish",
}


@click.command(cls=IdbCommand)
@click.argument("shell", type=click.Choice(list(_INSTALL)))
@pass_invocation
def completion(invocation: Invocation, shell: str) -> None:
    """Print a shell completion script."""
    from identity_broker.cli.main import cli

    completer = get_completion_class(shell)
    if completer is None:  # pragma: no cover - click ships these three
        raise click.BadParameter(f'no completion for "{shell}"')
    script = completer(cli, {}, "idb", "_IDB_COMPLETE").source()
    say(f"install: {_INSTALL[shell]}")
    emit(invocation.output, {"shell": shell, "script": script}, lambda: script)
