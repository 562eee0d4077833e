"""Takes secrets out of log lines, whoever put them in.

- The last processor before rendering; it looks at every string of a line, however nested.
- A net, not a licence: code that logs a secret is wrong even though it would be caught here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

REDACTED: Final = "[redacted]"
_SECRETS: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,32}PRIVATE KEY-----|\Z)"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]*)?"  # JWS, JWE
    r"|\bidbt_[A-Za-z0-9_-]{8,}"  # join tokens
    r"|\b(?:hv[sbr]|[sbr])\.[A-Za-z0-9_-]{20,}"  # Vault, OpenBao
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user:password in a URL
    r"|(?i:(?<=\bbearer )[A-Za-z0-9._~+/=-]{8,})"
    r"|(?i:(?<=password=)[^\s&;]+)",
    re.DOTALL,
)
_MAX_DEPTH: Final = 6


def redact(text: str) -> str:
    """`text` with every secret in it replaced."""
    return _SECRETS.sub(REDACTED, text)


def redact_event(
    _logger: object, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """The structlog processor."""
    for key, value in event.items():
        if isinstance(value, str):
            if len(value) > 8:
                event[key] = _SECRETS.sub(REDACTED, value)
        elif not isinstance(value, int | float | None):
            event[key] = _redacted(value, _MAX_DEPTH)
    return event


def _redacted(value: object, depth: int) -> object:
    if isinstance(value, str):
        return _SECRETS.sub(REDACTED, value)
    if isinstance(value, bool | int | float | None):
        return value
    if depth == 0:
        return REDACTED
    if isinstance(value, Mapping):
        return {redact(str(k)): _redacted(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(item, depth - 1) for item in value]
    return _SECRETS.sub(REDACTED, str(value))
