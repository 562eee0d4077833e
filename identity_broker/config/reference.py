"""The configuration in words: the reference table, and the effective values with secrets masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from identity_broker.config.agent_settings import AgentSettings
from identity_broker.config.duration import bounds_of
from identity_broker.config.settings import MASK, Section, Settings
from identity_broker.domain.duration import format_duration


def masked(section: Section, prefix: str = "") -> dict[str, str]:
    """Dotted key → effective value as text, for `idb config show`; secrets are stars."""
    shown: dict[str, str] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            shown |= masked(value, f"{prefix}{name}.")
        else:
            shown[f"{prefix}{name}"] = _masked_value(value)
    return shown


def reference_markdown() -> str:
    """One table for each section of the broker's: docs/reference/configuration.md."""
    return _markdown(
        Settings,
        "Configuration",
        "identity_broker/config/settings.py",
        "(`IDB_SERVER__ADDRESS` is `server.address`)",
    )


def agent_reference_markdown() -> str:
    """One table for each section of a node agent's: docs/reference/agent-configuration.md."""
    return _markdown(
        AgentSettings,
        "Configuration of the node agent",
        "identity_broker/config/agent_settings.py",
        "(`IDB_BROKER__ADDRESS` is `broker.address`)",
    )


def _markdown(root: type[Section], title: str, module: str, example: str) -> str:
    lines = [
        f"# {title}",
        "",
        f"Generated from `{module}`; do not edit.",
        "",
        "Sources, later wins: the TOML file, `IDB_…` environment variables "
        f"{example}, command-line flags.",
    ]
    for name, info in root.model_fields.items():
        lines += _section(name, info.annotation)
    return "\n".join(lines) + "\n"


def _section(name: str, model: Any) -> Iterator[str]:
    yield from ("", f"## `[{name}]`", "", (model.__doc__ or "").strip().splitlines()[0], "")
    yield from ("| key | default | meaning |", "|---|---|---|")
    yield from _rows(name, model)


def _rows(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        key = f"{prefix}.{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _rows(key, info.annotation)
            continue
        meaning = " ".join(filter(None, (info.description, _choices(info), _bounds(info))))
        yield f"| `{key}` | {_default(info)} | {meaning} |"


def _bounds(info: FieldInfo) -> str:
    found = next(filter(None, map(bounds_of, info.metadata)), "")
    return f"{found[0].upper()}{found[1:]}." if found else ""


def _choices(info: FieldInfo) -> str:
    for annotation in (info.annotation, *get_args(info.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            return "One of " + ", ".join(f"`{member.value}`" for member in annotation) + "."
    return ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    extra = info.json_schema_extra
    if isinstance(extra, Mapping):
        return f"`{extra['default_text']}`"
    value = info.get_default(call_default_factory=True)
    if value is None or value in ("", (), {}):
        return "none"
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _masked_value(value: object) -> str:
    if isinstance(value, SecretStr):
        return _without_password(value.get_secret_value())
    return _plain(value)


def _without_password(url: str) -> str:
    """A SQLite URL holds no secret; any other is shown by its scheme alone."""
    return url if url.startswith("sqlite:") else f"{url.partition('://')[0]}://{MASK}"
