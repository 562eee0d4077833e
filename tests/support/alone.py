"""An environment that holds one distribution and what it declares, and nothing else.

- The wheel is built and unpacked; its declared dependencies are linked in from the running
  environment, file by file, so the proof needs no package index and takes a second.
- A dependency that is used and not declared is not there, and the import fails.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def build_wheel(project: Path, out: Path) -> Path:
    """Builds the project with the backend it names."""
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=project,
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def requirements_of(wheel: Path) -> list[Requirement]:
    """What the wheel's own metadata declares."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        parsed = metadata.PathDistribution(zipfile.Path(archive, name.rsplit("/", 1)[0] + "/"))
        return [Requirement(text) for text in parsed.requires or []]


class LoneEnvironment:
    """A virtual environment with the closure of one wheel.

    Args:
        folder: where to make it.
        wheels: canonical name -> wheel, for the distributions of this repository.
    """

    def __init__(self, folder: Path, wheels: Mapping[str, Path]) -> None:
        venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
        self.python = folder / "bin" / "python"
        (self._site,) = folder.glob("lib/python*/site-packages")
        self._wheels = wheels
        self._done: set[tuple[str, str]] = set()

    def install(self, name: str, extras: Iterable[str] = ()) -> None:
        """Puts the distribution and, recursively, what it declares into the environment.

        Raises:
            AssertionError: the locked version is outside what a distribution declares.
        """
        for extra in ("", *extras):
            if (name, extra) in self._done:
                continue
            self._done.add((name, extra))
            if not extra:
                self._place(name)
            for requirement in self._requirements(name):
                if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                    continue
                if extra and not (requirement.marker and "extra" in str(requirement.marker)):
                    continue
                needed = canonicalize_name(requirement.name)
                if needed not in self._wheels:
                    installed = metadata.version(needed)
                    assert requirement.specifier.contains(installed, prereleases=True), (
                        f"{name} asks for {requirement}, {installed} is locked"
                    )
                self.install(needed, requirement.extras)

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        """Runs a program isolated from the caller's environment and folder."""
        return subprocess.run(
            [self.python, "-I", "-W", "error::ImportWarning", "-c", program],
            cwd=self._site,
            env={},
            capture_output=True,
            text=True,
            check=False,
        )

    def names(self) -> set[str]:
        """What is installed."""
        return {name for name, _ in self._done}

    def _requirements(self, name: str) -> list[Requirement]:
        if name in self._wheels:
            return requirements_of(self._wheels[name])
        return [Requirement(text) for text in metadata.requires(name) or []]

    def _place(self, name: str) -> None:
        if name in self._wheels:
            with zipfile.ZipFile(self._wheels[name]) as archive:
                archive.extractall(self._site)
            return
        distribution = metadata.distribution(name)
        for file in distribution.files or []:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            target = self._site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(file))))
