"""Workload attestors as plugins: found by name, imported only when the agent enables them.

- A plugin is an entry point of the group `identity_broker.workload_attestors` that names a
  `WorkloadAttestorPlugin`.
- A built-in name cannot be taken by another package, and a name has one provider.
- A plugin that cannot be loaded or configured is a ConfigError that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from identity_broker.attestors.plugin_loading import PluginGroup
from identity_broker.attestors.workload import WorkloadAttestor
from identity_broker.errors import ConfigError

GROUP: Final = "identity_broker.workload_attestors"
BUILT_IN: Final[Mapping[str, str]] = {
    "unix": "identity_broker.attestors.workload.unix:PLUGIN",
    "systemd": "identity_broker.attestors.workload.systemd:PLUGIN",
    "docker": "identity_broker.attestors.workload.docker:PLUGIN",
}

Options = TypeVar("Options", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class WorkloadAttestorPlugin:
    """One kind of workload attestor.

    Attributes:
        name: what the configuration calls it, and the type of its selectors.
        build: makes its attestors from its own table of the configuration; raises ConfigError. More
            than one where a slow part must not hold up the others; all are called `name`.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Sequence[WorkloadAttestor]]


_PLUGINS: Final = PluginGroup("workload attestor", GROUP, BUILT_IN, WorkloadAttestorPlugin)


def build_attestors(name: str, table: Mapping[str, Any]) -> tuple[WorkloadAttestor, ...]:
    """Load the plugin of that name and build its attestors.

    Raises:
        ConfigError: there is none, or several, or it cannot be loaded or configured.
    """
    plugin = _PLUGINS.load(name)
    attestors = tuple(plugin.build(table))
    if strangers := {attestor.name for attestor in attestors} - {name}:
        raise ConfigError(
            f'the workload attestor plugin "{name}" vouches for "{min(strangers)}"',
            hint="selectors are of the type that the plugin is named by",
        )
    return attestors


def options_of(model: type[Options], name: str, table: Mapping[str, Any]) -> Options:
    """Read an attestor's own table of the configuration.

    Raises:
        ConfigError: says which keys are wrong, never their values.
    """
    try:
        return model.model_validate(dict(table))
    except ValidationError as exc:
        problems = [
            f"{'.'.join(map(str, error['loc']))}: {error['msg']}"
            for error in exc.errors(include_input=False, include_url=False)
        ]
        raise ConfigError(
            f'the workload attestor "{name}" cannot be configured: {"; ".join(problems)}'
        ) from exc
