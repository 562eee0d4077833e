"""The entry point: `idb`, also installed as `identity-broker`.

- Nothing heavy is imported here: `idb --help` answers at once.
- Every failure leaves through `failure.failure_of`: one shape, one table of exit codes.
- gRPC's fork handlers are off: nothing here calls gRPC between fork and exec, and where gRPC has
  threads, one fork in fifty ends with their abort instead of the program that was to be started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from identity_broker.cli.exit_codes import ExitCode
from identity_broker.cli.failure import failure_of
from identity_broker.cli.options import Invocation
from identity_broker.cli.output import OutputFormat
from identity_broker.cli.tree import LazyCommand, LazyGroup

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before anything imports grpc

SECTIONS = {
    "Run a broker": {
        "dev": LazyCommand("dev", "dev", "Run OpenBao, a broker and an agent on this machine."),
        "demo": LazyCommand("demo", "demo", "Watch two services leave their shared API key."),
        "server": LazyCommand("server", "server", "Run a broker from a configuration file."),
        "agent": LazyCommand("agent", "agent", "Run a node agent, and see how it is doing."),
        "config": LazyCommand("config", "config", "Check and show a configuration."),
        "doctor": LazyCommand("doctor", "doctor", "Say what is wrong and what to do about it."),
    },
    "Decide who becomes what": {
        "token": LazyCommand("token", "token", "Make the tokens that nodes join with."),
        "node": LazyCommand("node", "node", "See, ban and evict attested nodes."),
        "entry": LazyCommand("entry", "entry", "Register who may become which identity."),
        "explain": LazyCommand(
            "explain", "explain", "Say why a node or a process would or would not get an identity."
        ),
    },
    "Identities": {
        "svid": LazyCommand("svid", "svid", "Fetch, show and verify SVIDs."),
        "credential": LazyCommand("credential", "credential", "See the ledger."),
        "authority": LazyCommand("authority", "authority", "See the signing authorities."),
        "bundle": LazyCommand("bundle", "bundle", "Show what the trust domain verifies with."),
        "envoy": LazyCommand(
            "envoy", "envoy", "Configure Envoys that take their identity from the node agent."
        ),
    },
    "Revoke": {
        "revoke": LazyCommand("revoke", "revoke", "Revoke, see who has heard, and keep the proof."),
        "hold": LazyCommand("hold", "hold", "See what is on hold, and lift holds."),
        "compromised": LazyCommand(
            "compromised",
            "compromised",
            "Revoke everything ever issued to a key, and refuse the key for ever.",
        ),
    },
    "Shell": {
        "completion": LazyCommand("completion", "completion", "Print a shell completion script."),
        "version": LazyCommand("version", "version", "Print the version."),
    },
}


@click.group(
    cls=LazyGroup,
    sections=SECTIONS,
    name="idb",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def cli() -> None:
    """Identity Broker: attest workloads, issue short-lived SPIFFE identities, revoke any of them.

    stdout is data, stderr is talk. Start with: idb demo
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `idb` and exit."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run `idb` with `arguments`; return the exit code."""
    invocation = Invocation()
    if instruction := os.environ.get("_IDB_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "idb", "_IDB_COMPLETE", instruction)
    try:
        # Not cli.main(): it has exit codes of its own for a closed pipe and for Ctrl-C.
        with cli.make_context("idb", list(arguments), obj=invocation) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stderr)
        return ExitCode.USAGE
    except Exception as error:  # noqa: BLE001 - this is where every failure is told
        failure = failure_of(error)
        failure.tell(as_json=_wants_json(invocation, arguments))
        return failure.code
    return ExitCode.OK


def _wants_json(invocation: Invocation, arguments: Sequence[str]) -> bool:
    """Whether errors are JSON; a command line that did not parse is searched for -o json."""
    if invocation.output is OutputFormat.JSON:
        return True
    words = " ".join(arguments)
    return any(f in f" {words} " for f in (" -o json ", " -ojson ", " --output json ", "=json "))


if __name__ == "__main__":
    main()
