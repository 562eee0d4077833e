"""Reads a configuration, the broker's or an agent's.

- TOML file, then IDB_… environment, then overrides; later wins.
- All problems are found before the first is reported, as "source: dotted.key: rule".
- No value is ever part of a problem: a secret under a mistyped key stays unseen.
- Relative paths in a file are relative to that file; elsewhere to the working directory.
- `IDB_SERVER__ADDRESS` is `server.address`; a variable without "__" is none of ours.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from identity_broker.config.agent_settings import (
    AgentSettings,
    agent_conflicts,
    agent_with_derived,
)
from identity_broker.config.settings import (
    InputFile,
    Section,
    Settings,
    conflicts_between,
    with_derived,
)
from identity_broker.errors import ConfigError

ENV_PREFIX: Final = "IDB_"
OVERRIDES: Final = "command line"
_POSITION: Final = re.compile(r"at (line \d+, column \d+|end of document)")
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True, slots=True)
class Form(Generic[_S]):
    """What a kind of configuration consists of, and the rules beyond its models.

    Attributes:
        root: its model; every field is a table.
        derive: fills in the defaults that depend on other values.
        conflicts: rules between tables that do not hold.
        clashes: keys that may not both be written: dotted key → rule.
        placeholders: values for required keys, so that the rest of their table can be checked.
        check: the command that lists every problem.
    """

    root: type[_S]
    derive: Callable[[Mapping[str, Any]], dict[str, Any]]
    conflicts: Callable[[_S], Mapping[str, str]]
    clashes: Callable[[Mapping[str, Any]], Mapping[str, str]]
    placeholders: Mapping[str, Mapping[str, Any]]
    check: str


def _both_urls(raw: Mapping[str, Any]) -> Mapping[str, str]:
    store = raw.get("store")
    if isinstance(store, Mapping) and {"url", "url_file"} <= store.keys():
        return {"store.url_file": "set either store.url or store.url_file"}
    return {}


BROKER: Final = Form(
    root=Settings,
    derive=with_derived,
    conflicts=conflicts_between,
    clashes=_both_urls,
    placeholders={"server": {"trust_domain": "placeholder.invalid"}},
    check="idb config check --config FILE",
)
AGENT: Final = Form(
    root=AgentSettings,
    derive=agent_with_derived,
    conflicts=agent_conflicts,
    clashes=lambda _raw: {},
    placeholders={
        "agent": {"trust_domain": "placeholder.invalid"},
        "broker": {
            "address": "placeholder.invalid:1",
            "bootstrap_address": "placeholder.invalid:2",
        },
    },
    check="idb agent config check --config FILE",
)


@dataclass(slots=True)
class _Layers(Generic[_S]):
    """The merged tables, and where each key came from."""

    form: Form[_S]

    raw: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    default_origin: str = "configuration"

    def put(self, key: tuple[str, ...], value: Any, origin: str) -> None:
        table = self.raw
        for name in key[:-1]:
            inner = table.get(name)
            if not isinstance(inner, dict):
                inner = table[name] = {}
            table = inner
        table[key[-1]] = value
        self.origins[".".join(key)] = origin

    def report(self, key: str, rule: str) -> None:
        self.problems.append(f"{self._origin(key)}: {key}: {rule}")

    def _origin(self, key: str) -> str:
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return self.default_origin


def load(
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Settings:
    """Read and check the broker's configuration.

    Args:
        path: the TOML file; None reads none.
        overrides: dotted key → value, from command-line flags; nested tables work as well.
        env: the environment; the process's own when None.

    Raises:
        ConfigError: lists every problem; `fields["problems"]` holds them one by one.
    """
    return load_form(BROKER, path, overrides, env)


def load_agent(
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> AgentSettings:
    """Read and check an agent's configuration; see `load`.

    Raises:
        ConfigError: lists every problem.
    """
    return load_form(AGENT, path, overrides, env)


def load_form(
    form: Form[_S],
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> _S:
    """Read and check a configuration of that form; see `load`.

    Raises:
        ConfigError: lists every problem.
    """
    layers = _Layers(form)
    if path is not None:
        layers.default_origin = path.name
        for key, value in _leaves(_read_toml(path, layers)):
            layers.put(key, _anchored(form.root, key, value, path.parent), path.name)
    for key, value, name in _from_env(os.environ if env is None else env):
        layers.put(key, value, name)
    for key, value in _leaves(overrides or {}):
        layers.put(tuple(".".join(key).split(".")), value, OVERRIDES)
    settings = _validated(layers)
    if settings is None or layers.problems:
        raise _config_error(layers.problems, form.check)
    return settings


def unreadable_files(settings: Section) -> Iterator[tuple[str, str]]:
    """The files the settings name that cannot be read: dotted key, rule."""
    for key, info, value in _fields(settings):
        if value is not None and any(isinstance(m, InputFile) for m in _metadata(info)):
            try:
                with Path(value).open("rb") as file:
                    file.read(1)
            except OSError as exc:
                why = exc.strerror or "unknown error"
                yield key, f"the file cannot be read ({why.lower()})"


def _config_error(problems: list[str], check: str) -> ConfigError:
    count = f"{len(problems)} problems" if len(problems) != 1 else "1 problem"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(
        f"the configuration cannot be used, {count}:{lines}",
        hint=f"{check} lists every problem",
        problems=tuple(problems),
    )


def _read_toml(path: Path, layers: _Layers[_S]) -> Mapping[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        return tomllib.loads(text)
    except OSError as exc:
        why = (exc.strerror or "unknown error").lower()
        layers.problems.append(f"{path.name}: the file cannot be read ({why})")
    except UnicodeDecodeError as exc:
        layers.problems.append(f"{path.name}: not UTF-8 at byte {exc.start}")
    except tomllib.TOMLDecodeError as exc:
        # tomllib's own words can quote the line: the position alone is safe to show.
        position = _POSITION.search(str(exc))
        where = position.group(1) if position else "an unknown position"
        layers.problems.append(f"{path.name}: not valid TOML at {where}")
    return {}


def _leaves(
    table: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _from_env(env: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    for name in sorted(env):
        if name.startswith(ENV_PREFIX) and "__" in name:
            key = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            if all(key):
                yield key, env[name], name


def _anchored(root: type[BaseModel], key: tuple[str, ...], value: Any, directory: Path) -> Any:
    """`value` with a relative path made relative to `directory`."""
    info = _field_at(root, key)
    if isinstance(value, str) and info is not None and _is_path(info):
        return str(directory.absolute() / value)
    return value


def _field_at(root: type[BaseModel], key: tuple[str, ...]) -> FieldInfo | None:
    model = root
    info: FieldInfo | None = None
    for depth, name in enumerate(key):
        info = model.model_fields.get(name)
        if info is None:
            return None
        if depth < len(key) - 1:
            inner = info.annotation
            if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
                return None
            model = inner
    return info


def _is_path(info: FieldInfo) -> bool:
    return any(a is Path for a in _flattened(info.annotation))


def _flattened(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _flattened(argument)


def _metadata(info: FieldInfo) -> Iterable[Any]:
    return (*info.metadata, *_flattened(info.annotation))


def _fields(section: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info, value


def _validated(layers: _Layers[_S]) -> _S | None:
    """The settings, or None with every problem reported."""
    form = layers.form
    fields = form.root.model_fields
    for key, rule in form.clashes(layers.raw).items():
        layers.report(key, rule)
    for name in layers.raw:
        if name not in fields:
            layers.report(_shown((name,)), _unknown(form.root, (name,)))
    raw = form.derive({name: layers.raw.get(name, {}) for name in fields})
    tables: dict[str, Section] = {}
    reported: set[str] = set()
    for name, info in fields.items():
        model = info.annotation
        assert isinstance(model, type)  # noqa: S101  # every field of a form is a table
        assert issubclass(model, Section)  # noqa: S101
        table = _validate_table(name, model, raw[name], layers, reported)
        if table is not None:
            tables[name] = table
    if len(tables) < len(fields):
        return None
    settings = form.root.model_construct(None, **tables)
    for key, rule in [*form.conflicts(settings).items(), *unreadable_files(settings)]:
        # A default that stands in for a broken value must not cause a second complaint.
        if key not in reported and not any(other in rule for other in reported):
            layers.report(key, rule)
    return settings


def _validate_table(
    name: str, model: type[Section], raw: Any, layers: _Layers[_S], reported: set[str]
) -> Section | None:
    """The table; with its broken fields at their defaults, once those are reported."""
    try:
        return model.model_validate(raw)
    except ValidationError as exc:
        broken = exc.errors(include_url=False, include_context=True, include_input=False)
    repaired: dict[str, Any] = raw if isinstance(raw, dict) else {}
    for error in broken:
        path = (name, *(str(part) for part in error["loc"]))
        path = path[: _depth(layers.form.root, path)]
        key = _shown(path)
        layers.report(key, _rule(layers.form.root, error["type"], error["msg"], path))
        reported.add(key)
        repaired = _without(repaired, path[1:])
    repaired = {**layers.form.placeholders.get(name, {}), **repaired}
    try:
        return model.model_validate(layers.form.derive({name: repaired})[name])
    except ValidationError:
        return None  # A table of the wrong type altogether; it is reported.


def _depth(root: type[BaseModel], path: tuple[str, ...]) -> int:
    """How much of an error's location names a key; the rest is pydantic's own."""
    for depth in range(1, len(path) + 1):
        info = _field_at(root, path[:depth])
        if info is None:
            return depth
        if not (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)):
            return depth
    return len(path)


def _without(table: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    if not key:
        return {}
    inner = table.get(key[0])
    rest = {name: value for name, value in table.items() if name != key[0]}
    if len(key) > 1 and isinstance(inner, dict):
        rest[key[0]] = _without(inner, key[1:])
    return rest


def _shown(key: tuple[str, ...]) -> str:
    """The key as it may be printed: a quoted key of any other shape could be a secret."""
    return ".".join(part if _KEY.fullmatch(part) else "(unprintable)" for part in key)


def _rule(root: type[BaseModel], kind: str, message: str, path: tuple[str, ...]) -> str:
    if kind == "extra_forbidden":
        return _unknown(root, path)
    if kind == "missing":
        return f"required (or {ENV_PREFIX}{'__'.join(path).upper()})"
    if kind in {"model_type", "dict_type", "model_attributes_type"}:
        return "must be a table"
    text = message.removeprefix("Value error, ")
    return text.replace("Input should be", "must be", 1)


def _unknown(root: type[BaseModel], path: tuple[str, ...]) -> str:
    known = sorted(known_keys(root))
    spoken = _shown(path)
    same_table = [key for key in known if key.rpartition(".")[0] == spoken.rpartition(".")[0]]
    for candidates in (same_table, known, [*root.model_fields]):
        close = get_close_matches(spoken, candidates, n=1, cutoff=0.75)
        if close:
            return f'unknown key; did you mean "{close[0]}"?'
    leaf = path[-1]
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return f'unknown key; did you mean "{elsewhere[0]}"?'
    return "unknown key"


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every dotted key there is."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
