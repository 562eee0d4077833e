"""The library as others meet it: what importing it loads, and whether its README is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import identity_ca

PACKAGE = Path(identity_ca.__file__).parent
MODULES = sorted(f"identity_ca.{path.stem}" for path in PACKAGE.glob("[a-z]*.py"))
FOREIGN = ("grpc", "hvac", "requests", "sqlalchemy", "sqlmodel", "pydantic", "spiffe")


def test_the_core_imports_nothing_foreign() -> None:
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FOREIGN!r}:
            raise ImportError("not a dependency of the core: " + name)
sys.meta_path.insert(0, Refuse())
for module in {MODULES!r}:
    __import__(module)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "identity_ca.issuer" in MODULES


def test_importing_the_package_itself_loads_no_module_of_it() -> None:
    program = "import sys, identity_ca; print([m for m in sys.modules if 'cryptography' in m])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_the_example_in_the_readme_runs() -> None:
    readme = (PACKAGE.parent / "README.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "spiffe://example.org/payments/api"


def test_the_map_names_every_module() -> None:
    assert identity_ca.__doc__ is not None
    for module in MODULES:
        assert module.removeprefix("identity_ca.") in identity_ca.__doc__
