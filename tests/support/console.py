"""Console blocks of a document, and a shell that types them.

A block is run when the line before its fence is `<!-- tested -->`. `<!-- tested: until PATH -->`
starts its one command in the background and waits for the path. A line that starts with `$ ` is
typed; the lines below it, where there are any, are what it prints: `…` stands for anything.
"""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = re.compile(
    r"^(?:<!-- (?P<tag>tested(?:: until (?P<until>\S+))?) -->\n)?```console\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Command:
    """What is typed, and what is said to be printed."""

    text: str
    printed: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """The commands of one fence."""

    tested: bool
    commands: tuple[Command, ...]


def blocks(document: str) -> list[Block]:
    """All console blocks, in order."""
    found = []
    for match in BLOCK.finditer(document):
        typed: list[list[str]] = []
        for line in match["body"].splitlines():
            if line.startswith("$ "):
                typed.append([line[2:]])
            elif typed and typed[-1][-1].endswith("\\"):
                typed[-1][-1] += f"\n{line.removeprefix('> ')}"
            elif typed:
                typed[-1].append(line)
        commands = tuple(
            Command(lines[0], "\n".join(lines[1:]), match["until"] or "") for lines in typed
        )
        found.append(Block(match["tag"] is not None, commands))
    return found


def matches(said: str, printed: str) -> bool:
    """Whether the output is what the document says; `…` stands for anything, runs of blanks too."""
    pattern = ".*".join(re.escape(part) for part in " ".join(said.split()).split("…"))
    return re.fullmatch(pattern, " ".join(printed.split())) is not None


@dataclass
class Typist:
    """Types commands in one folder, one after the other, and remembers variables between them."""

    folder: Path
    environment: dict[str, str]
    patience: float = 60
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def type(self, command: Command) -> str:
        """Runs the command and returns what it prints.

        Raises:
            AssertionError: it failed, or printed something else.
        """
        if command.until:
            self._start(command)
            return ""
        state = self.folder / ".variables"
        script = (
            f"[ ! -e {state} ] || . {state}\nset -a\n{command.text}\n"
            f"code=$?; export -p > {state}; exit $code"
        )
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.patience,
            check=False,
        )
        everything = f"$ {command.text}\n{result.stdout}{result.stderr}"
        assert result.returncode == 0, everything
        if command.printed:
            assert matches(command.printed, result.stdout), (
                f"{everything}\n--- the document says ---\n{command.printed}"
            )
        return result.stdout

    def _start(self, command: Command) -> None:
        log = (self.folder / "background.log").open("wb")
        with log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command.text}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._running.append(process)
        deadline = time.monotonic() + self.patience
        while not (self.folder / command.until).exists():
            output = (self.folder / "background.log").read_text()
            assert process.poll() is None, output
            assert time.monotonic() < deadline, output
            time.sleep(0.05)

    def close(self) -> None:
        """Ends what was started in the background, as Ctrl-C would."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait(timeout=15)
