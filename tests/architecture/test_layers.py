"""Who may import whom."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support import repository


def lint_imports(config: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", config, "--no-cache"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_contract_holds() -> None:
    result = lint_imports(repository.ROOT / "pyproject.toml", repository.ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "offence",
    [
        ("domain/offence.py", "import identity_broker.lifecycle"),
        ("lifecycle/offence.py", "import grpc"),
        ("server/offence.py", "import sqlmodel"),
        ("cli/offence.py", "import identity_broker.store"),
        ("new_layer.py", ""),
    ],
    ids=["upwards", "grpc", "sql", "cli-store", "unplaced"],
)
def test_the_contracts_refuse_an_offence(tmp_path: Path, offence: tuple[str, str]) -> None:
    """The contracts are only worth something if they can fail: copy the imports, add one."""
    contracts = tomllib.loads((repository.ROOT / "pyproject.toml").read_text())["tool"][
        "importlinter"
    ]["contracts"]
    for name, folder in repository.PACKAGES.items():
        for path in repository.package_modules():
            if path.is_relative_to(folder):
                copy = tmp_path / name / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text("")
        for init in {p.parent for p in (tmp_path / name).rglob("*.py")}:
            (init / "__init__.py").touch()
    offender, line = offence
    (tmp_path / "identity_broker" / offender).write_text(f"{line}\n")
    config = tmp_path / "pyproject.toml"
    whole = (repository.ROOT / "pyproject.toml").read_text()
    config.write_text(whole[whole.index("[tool.importlinter]") :])

    result = lint_imports(config, tmp_path)

    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{len(contracts) - 1} kept, 1 broken" in result.stdout


def test_no_package_imports_the_tests() -> None:
    ours = {"support", "tests", "conftest"}
    offences = [
        f"{repository.relative(path)}:{found.line} imports {found.module}"
        for path in repository.package_modules()
        for found in repository.imports(path)
        if found.module.split(".")[0] in ours
    ]
    assert not offences


def test_one_module_at_most_imports_the_private_stubs_of_py_spiffe() -> None:
    """workload.proto has no package: a second compiled copy clashes with py-spiffe's."""
    importers = {
        repository.relative(path)
        for path in repository.package_modules()
        for found in repository.imports(path)
        if found.module.startswith("spiffe._")
    }
    assert len(importers) <= 1, importers


def test_our_own_code_is_never_mocked() -> None:
    offences = [
        f"{repository.relative(path)}:{found.line}"
        for path in repository.modules_of_tests()
        for found in repository.imports(path)
        if found.module.startswith(("unittest.mock", "mock", "pytest_mock"))
    ]
    assert not offences


def test_names_of_tests_are_unique() -> None:
    """importlib mode names a module by its file: two of one name would hide one."""
    names = [p.name for p in repository.modules_of_tests() if p.name.startswith("test_")]
    assert sorted(set(names)) == sorted(names)
