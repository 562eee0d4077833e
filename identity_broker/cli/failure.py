"""How a failure is told: one shape on stderr, for a person or as JSON, and an exit code.

- Every exception that reaches `main` becomes a `Failure` here, and nowhere else.
- An unexpected exception is a bug: its type is shown, its text is not (it may hold anything);
  IDB_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

import click

from identity_broker.cli.exit_codes import BY_CA_ERROR, BY_CLIENT_ERROR, BY_KIND, ExitCode
from identity_broker.cli.output import Style, clean, paint
from identity_broker.errors import BrokerError


@dataclass(frozen=True, slots=True)
class Failure:
    """What is told of a failure; `problems` lists the parts where there are several."""

    code: ExitCode
    message: str
    reason: str
    hint: str = ""
    id: str = ""
    problems: tuple[str, ...] = ()

    def tell(self, *, as_json: bool) -> None:
        """Print it on stderr."""
        print(self._to_json() if as_json else self._to_text(), file=sys.stderr)

    def to_document(self) -> dict[str, object]:
        """The failure as JSON shows it."""
        document: dict[str, object] = {
            "message": self.message,
            "reason": self.reason,
            "hint": self.hint,
            "id": self.id,
            "exit_code": int(self.code),
        }
        if self.problems:
            document["problems"] = list(self.problems)
        return document

    def _to_json(self) -> str:
        return json.dumps({"error": self.to_document()})

    def _to_text(self) -> str:
        lines = [f"{paint('error:', Style.BAD, sys.stderr)} {clean(self.message)}"]
        lines += [f"  - {clean(problem)}" for problem in self.problems]
        if self.hint:
            lines.append(f"{paint('hint:', Style.HEAD, sys.stderr)} {clean(self.hint)}")
        tail = f"reason: {self.reason}"
        if self.id:
            tail += f"  id: {clean(self.id)}"
        lines.append(paint(tail, Style.DIM, sys.stderr))
        return "\n".join(lines)


def failure_of(error: BaseException) -> Failure:
    """What is told of `error`."""
    if isinstance(error, click.ClickException):
        return _of_click(error)
    if isinstance(error, BrokerError):
        return _of_broker(error)
    from identity_ca.errors import CAError
    from identity_client.errors import IdentityError

    if isinstance(error, IdentityError):
        code = _code(error, BY_CLIENT_ERROR)
        return Failure(code, error.message, error.reason, error.hint, error.correlation_id)
    if isinstance(error, CAError):
        return Failure(_code(error, BY_CA_ERROR), error.message, error.reason, error.hint)
    return _of_bug(error)


def _of_broker(error: BrokerError) -> Failure:
    problems = tuple(str(item) for item in error.fields.get("problems", ()))
    message = error.public
    if problems:
        message = message.partition("\n")[0].removesuffix(":")  # the rest repeats the problems
    return Failure(BY_KIND[error.kind], message, error.reason, error.hint, problems=problems)


def _of_click(error: click.ClickException) -> Failure:
    hint = ""
    context = getattr(error, "ctx", None)
    if context is not None:
        hint = f"{context.command_path} --help"
    message = error.format_message().removesuffix(".")
    return Failure(ExitCode.USAGE, message[:1].lower() + message[1:], "USAGE", hint)


def _of_bug(error: BaseException) -> Failure:
    if os.environ.get("IDB_TRACEBACK"):
        traceback.print_exception(error)
    return Failure(
        ExitCode.BUG,
        f"idb failed with {type(error).__name__}; this is a bug",
        "INTERNAL",
        "IDB_TRACEBACK=1 shows where; please report it",
        secrets.token_hex(8),
    )


def _code(error: BaseException, table: Mapping[str, ExitCode]) -> ExitCode:
    names = (cls.__name__ for cls in type(error).__mro__)
    return next((table[name] for name in names if name in table), ExitCode.BUG)
