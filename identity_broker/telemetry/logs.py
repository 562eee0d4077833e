"""The log: JSON lines for machines or coloured ones for people, through one set of processors.

- `configure` is called once by each entry point; library code only asks for a logger.
- What libraries log through the standard library passes the same processors.
- Lines written while a call is served carry its correlation id, method and caller.
- Redaction runs last, on every line.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from identity_broker.config.settings import LogFormat, LogLevel
from identity_broker.telemetry.redaction import redact_event

LEVELS: Final = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}
# What these say at INFO is either noise or said by us.
_QUIET: Final = ("uvicorn", "uvicorn.error", "apscheduler", "alembic", "hvac", "urllib3", "grpc")

_call: ContextVar[tuple[str, str, str] | None] = ContextVar("idb_call", default=None)


def configure(
    level: LogLevel = LogLevel.INFO,
    format: LogFormat = LogFormat.JSON,
    stream: TextIO | None = None,
) -> None:
    """Set up logging for the process; a later call replaces an earlier one.

    Args:
        level: the least severe line that is written.
        format: JSON or console.
        stream: where to; standard error when None.
    """
    target = sys.stderr if stream is None else stream
    structlog.configure(
        processors=[*_shared(), *_last(format, target)],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(target),
        # Not cached: a logger asked for at import must follow a later `configure`.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_last(format, target),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[level]))


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines say which part of the broker they are from, such as "rpc"."""
    return cast("FilteringBoundLogger", structlog.get_logger(part=name))


def bind_call(correlation_id: str, method: str, caller: str = "") -> None:
    """Lines of this task, and of those it starts, belong to that call from now on."""
    _call.set((correlation_id, method, caller))


def current_correlation_id() -> str:
    """The correlation id of the call being served; empty outside one."""
    call = _call.get()
    return "" if call is None else call[0]


def _merge_call(
    _logger: object, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    call = _call.get()
    if call is not None:
        correlation_id, method, caller = call
        event.setdefault("correlation_id", correlation_id)
        event.setdefault("method", method)
        if caller:
            event.setdefault("caller", caller)
    return event


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        _merge_call,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _last(format: LogFormat, target: TextIO) -> list[Processor]:
    # A traceback becomes text before redaction; a prettier one would show the locals as well.
    render: Processor = _render_json
    if format is LogFormat.CONSOLE:
        render = structlog.dev.ConsoleRenderer(
            colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    return [structlog.processors.format_exc_info, redact_event, render]


def _render_json(_logger: object, _name: str, event: MutableMapping[str, Any]) -> str:
    return json.dumps(event, default=str, separators=(",", ":"), ensure_ascii=False)
