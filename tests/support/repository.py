"""The repository as data: its files, its packages, what imports what."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Import name -> the folder that holds it.
PACKAGES = {
    "identity_broker": ROOT / "identity_broker",
    "identity_ca": ROOT / "ca" / "identity_ca",
    "identity_client": ROOT / "clients" / "python" / "identity_client",
    "identity_api": ROOT / "protos" / "identity_api",
}


class Import(NamedTuple):
    """One import statement's target, and where it stands."""

    path: Path
    line: int
    module: str


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file that is, or is about to be, under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = (ROOT / name for name in sorted(set(listed.split("\0"))) if name)
    return tuple(path for path in paths if path.is_file() and not path.is_symlink())


def relative(path: Path) -> str:
    """The path as people write it: from the top of the repository."""
    return path.relative_to(ROOT).as_posix()


def is_generated(path: Path) -> bool:
    """Whether protoc wrote the file."""
    return path.stem.endswith(("_pb2", "_pb2_grpc"))


def package_modules() -> tuple[Path, ...]:
    """The hand-written modules of the four packages."""
    return tuple(
        path
        for path in files()
        if path.suffix == ".py"
        and not is_generated(path)
        and any(path.is_relative_to(folder) for folder in PACKAGES.values())
    )


def modules_of_tests() -> tuple[Path, ...]:
    """Everything in tests/ that is Python."""
    return tuple(p for p in files() if p.suffix == ".py" and p.is_relative_to(ROOT / "tests"))


def imports(path: Path) -> list[Import]:
    """All absolute imports of one module, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(Import(path, node.lineno, node.module))
            found += [Import(path, node.lineno, f"{node.module}.{a.name}") for a in node.names]
    return found


def text_of(path: Path) -> str | None:
    """The file's text, or None when it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
