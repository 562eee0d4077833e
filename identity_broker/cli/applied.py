"""`--wait`: a change is done when the agents concerned have applied it.

- The change is stored, and shown, before the wait begins: whatever becomes of the wait, it stays.
- Connected agents that the broker told of the change are waited for; nodes named by an entry are
  waited for even while their agents are away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.errors import NotApplied
from identity_broker.cli.options import Duration
from identity_broker.cli.output import clean, duration, say

if TYPE_CHECKING:
    from identity_client.admin import Applied, Entry

C = TypeVar("C", bound=Callable[..., Any])

_NODE_PATH = "/idb/node/"
_NAMED = 3


def wait_options(function: C) -> C:
    """Add --wait and --timeout."""
    function = click.option(
        "--timeout",
        type=Duration(),
        default="10s",
        show_default=True,
        help="How long --wait waits.",
    )(function)
    return click.option(
        "--wait", is_flag=True, help="Return when the agents concerned have applied it."
    )(function)


def wait_applied(session: Session, timeout: timedelta, named: Iterable[Entry] = ()) -> None:
    """Wait until the change that was just made is applied, and say by whom.

    Args:
        named: entries whose parents, where they are nodes, are waited for in any case.

    Raises:
        NotApplied: somebody has not applied it in time.
    """
    nodes = sorted({one.parent_id for one in named if _is_node(one.parent_id)})
    found = session.admin.nodes.wait_applied(nodes, timeout=timeout)
    if found.pending:
        raise _not_applied(found, timeout)
    if nodes:
        say(f"applied by {'its agent' if len(nodes) == 1 else f'all {len(nodes)} agents'}")
    elif found.connected > 1:
        say(f"all {found.connected} connected agents are up to date")
    else:
        connected = "the one connected agent is up to date" if found.connected else ""
        say(connected or "no agent is connected to this broker")


def _is_node(parent_id: str) -> bool:
    return f"/{parent_id.removeprefix('spiffe://').partition('/')[2]}".startswith(_NODE_PATH)


def _not_applied(found: Applied, timeout: timedelta) -> NotApplied:
    shown = ", ".join(clean(node) for node in found.pending[:_NAMED])
    more = len(found.pending) - _NAMED
    if more > 0:
        shown += f" and {more} more"
    return NotApplied(
        f"the change is stored, but not applied within {duration(timeout)} by {shown}"
    )
