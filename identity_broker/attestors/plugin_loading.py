"""Plugins by entry point: found by name, imported only when the configuration names them.

- A built-in name cannot be taken by another package, and a name has one provider.
- A plugin that cannot be loaded, or calls itself something else, is a ConfigError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from identity_broker.errors import ConfigError


class Plugin(Protocol):
    """What an entry point names."""

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        ...


P = TypeVar("P", bound=Plugin)


@dataclass(frozen=True, slots=True)
class PluginGroup(Generic[P]):
    """One kind of plugin.

    Attributes:
        title: what people call it: "node attestor".
        group: the group of its entry points.
        built_in: name → entry point value of those that come with us.
        plugin_type: what an entry point must name.
    """

    title: str
    group: str
    built_in: Mapping[str, str]
    plugin_type: type[P]

    def load(self, name: str) -> P:
        """Load the plugin of that name.

        Raises:
            ConfigError: there is none, or several, or it cannot be loaded.
        """
        point = self._entry_point(name)
        try:
            plugin = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f'the {self.title} plugin "{point.name}" cannot be loaded', detail=str(error)
            ) from error
        if not isinstance(plugin, self.plugin_type):
            raise ConfigError(f'"{point.value}" is not a {self.plugin_type.__name__}')
        if plugin.name != name:
            raise ConfigError(f'the {self.title} plugin "{name}" calls itself "{plugin.name}"')
        return plugin

    def _entry_point(self, name: str) -> EntryPoint:
        found = set(entry_points(group=self.group, name=name))
        if name in self.built_in:
            # By its value: an editable checkout and an installed wheel may both list ours.
            ours = EntryPoint(name, self.built_in[name], self.group)
            strangers = {point.value for point in found} - {ours.value}
            if strangers:
                raise ConfigError(
                    f'another package offers a {self.title} "{name}", which is built in',
                    hint=f"uninstall the package that provides {min(strangers)}",
                )
            return ours
        if not found:
            raise ConfigError(
                f'no installed package offers the {self.title} "{name}"',
                hint=f"built in: {', '.join(sorted(self.built_in))}",
            )
        if len({point.value for point in found}) > 1:
            raise ConfigError(f'several installed packages offer the {self.title} "{name}"')
        return found.pop()
