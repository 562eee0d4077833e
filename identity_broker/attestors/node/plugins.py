"""Node attestors as plugins: found by name, imported only when the configuration enables them.

- A plugin is an entry point of the group `identity_broker.node_attestors` that names a
  `NodeAttestorPlugin`.
- A built-in name cannot be taken by another package, and a name has one provider.
- A plugin that cannot be loaded or configured is a ConfigError that names it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from identity_broker.attestors.node import NodeAttestor
from identity_broker.attestors.plugin_loading import PluginGroup
from identity_broker.domain.clock import Clock
from identity_broker.domain.node import JoinToken
from identity_ca.spiffe_id import TrustDomain

GROUP: Final = "identity_broker.node_attestors"
BUILT_IN: Final[Mapping[str, str]] = {
    "join_token": "identity_broker.attestors.node.join_token:PLUGIN",
    "x509_pop": "identity_broker.attestors.node.x509_pop:PLUGIN",
}


@dataclass(frozen=True, slots=True)
class AttestorContext:
    """What the broker lends an attestor.

    Attributes:
        trust_domain: the trust domain nodes join.
        consume: marks the join token with that hash as used and returns it.
        release: marks it as unused again.
    """

    trust_domain: TrustDomain
    clock: Clock
    consume: Callable[[str], Awaitable[JoinToken]]
    release: Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class NodeAttestorPlugin:
    """One kind of node attestor.

    Attributes:
        name: what nodes and the configuration call it.
        build: makes the attestor from its own table of the configuration; raises ConfigError.
    """

    name: str
    build: Callable[[AttestorContext, Mapping[str, Any]], NodeAttestor]


_PLUGINS: Final = PluginGroup("node attestor", GROUP, BUILT_IN, NodeAttestorPlugin)


def build_attestor(name: str, context: AttestorContext, table: Mapping[str, Any]) -> NodeAttestor:
    """Load the plugin of that name and build its attestor.

    Raises:
        ConfigError: there is none, or several, or it cannot be loaded or configured.
    """
    plugin = _PLUGINS.load(name)
    return plugin.build(context, table)
