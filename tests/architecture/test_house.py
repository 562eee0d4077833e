"""The shape of the repository: what stands where, how long a file may be, what may not be said."""

from __future__ import annotations

import os
import re
import tomllib

import pytest

from support import repository

TOP_LEVEL = {
    *("identity_broker", "protos", "ca", "clients", "tests", "deploy", "docs", ".ci"),
    *("pyproject.toml", "Makefile", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"),
    *("SECURITY.md", "CHANGELOG.md", "LICENSE", ".gitignore"),
}

# A module named so has no one thing that it is for.
VAGUE = {"common", "helper", "helpers", "manager", "misc", "shared", "util", "utils"}

# Longer than this is a smell. What is longer and reads better whole stands below, with the reason.
LONGEST_MODULE = 500
LONGER_FOR_A_REASON = {
    "ca/identity_ca/jwt.py": "making and checking a JWT-SVID follow one document, clause by clause",
    "clients/python/identity_client/node/keeper.py": "one state machine: how a node stays a node",
    "identity_broker/errors.py": "the one tree of everything the broker refuses with",
    "identity_broker/config/settings.py": "one table of every setting, a class a section",
    "identity_broker/server/rpc/pipeline.py": "the order of a call's steps is its subject",
}

# Hosts that text may name: standards, licences, projects. Anything else is a machine somewhere.
HOSTS = {
    *("spiffe.io", "www.apache.org", "keepachangelog.com", "semver.org", "adr.github.io"),
    *("openbao.org", "datatracker.ietf.org", "www.rfc-editor.org", "github.com"),
    *("json-schema.org", "docs.python.org", "developer.hashicorp.com", "grpc.io"),
}
# RFC 2606 and RFC 6761: names that lead nowhere.
RESERVED = re.compile(
    r"(^|\.)(example|test|invalid|localhost|local|internal|svc|example\.(org|com|net))$"
)
URL = re.compile(r"https?://([A-Za-z0-9.-]*[A-Za-z][A-Za-z0-9.-]*\.[A-Za-z]{2,})")
INDEX_HOSTS = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("npmjs", "org"),
            ("debian", "org"),
            ("golang", "org"),
            ("crates", "io"),
        )
    )
)
# Folders of whoever wrote it, not of whoever reads it.
MACHINE_PATH = re.compile(r"(?<![\w.*}-])/(?:home|root|Users|work)/[A-Za-z0-9_.-]+")
SECRET = re.compile(r"-----BEGIN (?:EC |RSA |ENCRYPTED )?PRIVATE KEY-----\s*\n[A-Za-z0-9+/=]{20}")


def scan(pattern: re.Pattern[str], *, skip: frozenset[str] = frozenset()) -> list[str]:
    """`file:line: match` for every match in every text file."""
    found = []
    for path in repository.files():
        name = repository.relative(path)
        text = repository.text_of(path)
        if text is None or name in skip or name == ".ci/constraints.txt":
            continue
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {match[0]}")
    return found


def test_the_top_level_is_fixed() -> None:
    top = {repository.relative(path).split("/")[0] for path in repository.files()}
    assert top <= TOP_LEVEL, f"belongs below one of the folders: {sorted(top - TOP_LEVEL)}"
    assert top >= TOP_LEVEL, f"missing: {sorted(TOP_LEVEL - top)}"


def test_a_module_is_named_for_what_it_is_for() -> None:
    vague = [
        repository.relative(path)
        for path in repository.files()
        if path.suffix == ".py" and VAGUE & {*path.relative_to(repository.ROOT).parts, path.stem}
    ]
    assert not vague


def test_modules_stay_readable_in_one_sitting() -> None:
    long = {
        repository.relative(path): lines
        for path in repository.package_modules()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_MODULE
    }
    assert long.keys() <= LONGER_FOR_A_REASON.keys(), f"split by noun, or give a reason: {long}"
    assert LONGER_FOR_A_REASON.keys() <= long.keys(), "no longer long; take it off the list"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        repository.relative(path)
        for path in repository.package_modules()
        if (text := path.read_text(encoding="utf-8")).strip()
        and not text.lstrip().startswith(('"""', 'r"""'))
    ]
    assert not silent


def test_no_path_of_a_machine() -> None:
    assert not scan(MACHINE_PATH)


def test_no_address_of_a_package_index() -> None:
    assert not scan(INDEX_HOSTS)


def test_only_known_hosts_are_named() -> None:
    unknown = [
        found
        for found in scan(URL)
        if (host := found.rsplit("//", 1)[1].rstrip(".").lower()) not in HOSTS
        and not RESERVED.search(host)
    ]
    assert not unknown, "use a reserved name (example.org), or add the host with care"


def test_no_private_key_is_kept() -> None:
    assert not scan(SECRET)


def test_no_merge_is_left_half_done() -> None:
    assert not scan(re.compile(r"^(?:<{7} |>{7} |={7}$)", re.MULTILINE))


@pytest.mark.parametrize("script", [".ci/run", ".ci/setup", ".ci/lock"])
def test_scripts_can_be_run(script: str) -> None:
    path = repository.ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/")


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog 1.1: newest first, known headings, the released version named."""
    text = (repository.ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)
    assert releases[0] == ("Unreleased", "")
    assert all(date for _, date in releases[1:])
    assert [date for _, date in releases[1:]] == sorted(
        (date for _, date in releases[1:]), reverse=True
    )
    headings = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_makefile_has_the_verbs() -> None:
    makefile = (repository.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## .+$", makefile, re.MULTILINE))
    assert targets >= {
        *("help", "setup", "demo", "dev", "test", "check", "bench", "protos", "docs", "fuzz"),
        *("clean",),
    }


def test_every_rule_switched_off_has_its_reason() -> None:
    text = (repository.ROOT / "pyproject.toml").read_text()
    start = text.index("[tool.ruff.lint]\n")
    block = text[start : text.index("\n]\n", start)]
    for line in block.splitlines()[3:]:
        assert re.match(r'    "[A-Z0-9]+", +# \S', line), line
    ruff = tomllib.loads(text)["tool"]["ruff"]["lint"]
    assert ruff["select"] == ["ALL"]
