"""A program of its own for each service of the demonstration: the kernel tells them apart by it.

- A copy of this Python under the service's name: /proc/PID/exe is then `…/orders/bin/orders`, and
  that is what the agent attests. A real service has its own executable, user or container.
- It finds the same packages: the environment's `pyvenv.cfg` and `lib` stand beside it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def program_of(role: str, folder: Path) -> Path:
    """Make `folder/<role>/bin/<role>`, or find it; return its path, without symbolic links."""
    home = folder.resolve() / role
    program = home / "bin" / role
    if program.exists():
        return program
    program.parent.mkdir(parents=True)
    environment = Path(sys.prefix)
    if (environment / "pyvenv.cfg").exists():
        shutil.copy(environment / "pyvenv.cfg", home / "pyvenv.cfg")
        for name in ("lib", "lib64"):
            if (environment / name).exists():
                (home / name).symlink_to(environment / name)
    shutil.copy(Path(sys.executable).resolve(), program)
    return program
