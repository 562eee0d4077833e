"""Files named on the command line.

- A failure names the file and the reason, never what the file holds.
- A secret is written whole or not at all, and only its owner may read it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from identity_broker.cli.errors import FileUnusable
from identity_broker.dev.state import write_private

_LIMIT = 16 * 1024 * 1024


def read_input(path: Path) -> bytes:
    """All of a file, or of stdin for "-".

    Raises:
        FileUnusable: it cannot be read, or is larger than 16 MiB.
    """
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(_LIMIT + 1)
        else:
            with path.open("rb") as file:
                content = file.read(_LIMIT + 1)
    except OSError as exc:
        raise FileUnusable(f'"{path}" cannot be read: {_why(exc)}') from exc
    if len(content) > _LIMIT:
        raise FileUnusable(f'"{path}" is larger than 16 MiB')
    return content


def read_secret(path: Path) -> str:
    """The secret in a file, or on stdin for "-", without the line's end.

    Raises:
        FileUnusable: it cannot be read, is empty, or is no text.
    """
    try:
        secret = read_input(path).decode("ascii").strip()
    except UnicodeDecodeError:
        raise FileUnusable(f'"{path}" does not hold one line of text') from None
    if not secret or len(secret.split()) != 1:
        raise FileUnusable(f'"{path}" does not hold one line of text')
    return secret


def write_secret(path: Path, text: str) -> None:
    """Write a file only its owner may read (0600).

    Raises:
        FileUnusable: it cannot be written.
    """
    try:
        write_private(path, text)
    except OSError as exc:
        raise FileUnusable(f'"{path}" cannot be written: {_why(exc)}') from exc


def write_text(path: Path, text: str) -> None:
    """Write a file that holds no secret.

    Raises:
        FileUnusable: it cannot be written.
    """
    try:
        path.write_text(text if text.endswith("\n") else f"{text}\n", "utf-8")
    except OSError as exc:
        raise FileUnusable(f'"{path}" cannot be written: {_why(exc)}') from exc


def _why(error: OSError) -> str:
    return (error.strerror or "unknown reason").lower()
