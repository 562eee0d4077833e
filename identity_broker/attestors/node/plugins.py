"""Node attestors as plugins: found by name, imported only when the configuration enables them.

- A plugin is an entry point of the group `identity_broker.node_attestors` that names a
  `NodeAttestorPlugin`.
- A built-in name cannot be taken by another package, and a name has one provider.
- A plugin that cannot be loaded or configured is a ConfigError that names it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from identity_broker.attestors.node import NodeAttestor
from identity_broker.domain.clock import Clock
from identity_broker.domain.node import JoinToken
from identity_broker.errors import ConfigError
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


def build_attestor(name: str, context: AttestorContext, table: Mapping[str, Any]) -> NodeAttestor:
    """Load the plugin of that name and build its attestor.

    Raises:
        ConfigError: there is none, or several, or it cannot be loaded or configured.
    """
    plugin = _load(_entry_point(name))
    if plugin.name != name:
        raise ConfigError(f'the node attestor plugin "{name}" calls itself "{plugin.name}"')
    return plugin.build(context, table)


def _entry_point(name: str) -> EntryPoint:
    found = set(entry_points(group=GROUP, name=name))
    if name in BUILT_IN:
        # By its value: an editable checkout and an installed wheel may both list ours.
        ours = EntryPoint(name, BUILT_IN[name], GROUP)
        strangers = {point.value for point in found} - {ours.value}
        if strangers:
            raise ConfigError(
                f'another package offers a node attestor "{name}", which is built in',
                hint=f"uninstall the package that provides {min(strangers)}",
            )
        return ours
    if not found:
        raise ConfigError(
            f'no installed package offers the node attestor "{name}"',
            hint=f"built in: {', '.join(sorted(BUILT_IN))}",
        )
    if len({point.value for point in found}) > 1:
        raise ConfigError(f'several installed packages offer the node attestor "{name}"')
    return found.pop()


def _load(point: EntryPoint) -> NodeAttestorPlugin:
    try:
        plugin = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'the node attestor plugin "{point.name}" cannot be loaded', detail=str(error)
        ) from error
    if not isinstance(plugin, NodeAttestorPlugin):
        raise ConfigError(f'"{point.value}" is not a NodeAttestorPlugin')
    return plugin
