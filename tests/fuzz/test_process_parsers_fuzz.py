"""What is read of a process: any bytes are understood or refused, and nobody's name is a fact."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from identity_broker.attestors.workload.cgroup import (
    parse_cgroup,
    parse_mountinfo,
    segments,
    systemd_path,
    user_of,
)
from identity_broker.attestors.workload.docker import container_ids, container_ids_of_mounts
from identity_broker.attestors.workload.engine import _response
from identity_broker.attestors.workload.facts import selectors_of
from identity_broker.attestors.workload.systemd import facts_of
from identity_broker.domain.procfs import (
    ProcessOwner,
    ProcessStat,
    parse_stat,
    parse_status,
)
from identity_broker.domain.selector_syntax import SelectorSyntax

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
# What prctl(PR_SET_NAME) takes: up to 15 bytes, none of them NUL.
NAMES = st.binary(max_size=15).map(lambda raw: raw.replace(b"\0", b""))
STATS = (
    b"4242 (%s) S 1 4242 4242 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 %d 1000 100 "
    b"18446744073709551615 %d 94000000000000 %d 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
)
STATUS = (
    b"Name:\t%s\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t42\nNgid:\t0\nPid:\t42\nPPid:\t1\n"
    b"TracerPid:\t0\nUid:\t%d\t%d\t%d\t%d\nGid:\t%d\t%d\t%d\t%d\nFDSize:\t64\nGroups:\t%s \n"
    b"NStgid:\t42\nVmPeak:\t 100 kB\n"
)
PATHS = st.lists(
    st.binary(min_size=1, max_size=80).map(
        lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_").replace(b"\n", b"_")
    ),
    max_size=5,
).map(lambda parts: b"/" + b"/".join(parts))
PIECES = st.sampled_from(
    [
        *(b"0::/", b"1:name=systemd:/", b"system.slice", b"user.slice", b"user-1000.slice", b"/"),
        *(b"user@1000.service", b".service", b".slice", b".scope", b"docker-", b"a" * 64, b"\n"),
        *(b"_", b"..", b" (deleted)", b":", b"-", b" ", b"\\040", b"\\777", b"36 35 98:0 /", b"\r"),
        *(b"/var/lib/docker/containers/", b"/etc/hostname", b" - ext4 x rw", b"Uid:\t", b"\xff"),
    ]
)
TEXTS = st.one_of(
    st.binary(max_size=400), st.lists(PIECES, max_size=20).map(b"".join), st.text().map(str.encode)
)


def escaped(name: bytes) -> bytes:
    """As the kernel writes a name into /proc/PID/status (ESCAPE_SPACE | ESCAPE_SPECIAL)."""
    return name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")


@given(NAMES, U64, U64, U64)
@example(b") S 1 2 3 4 5 6", 7, 8, 9)
@example(b"\n4242 (x) R 1 ", 7, 8, 9)
def test_a_name_is_no_field_of_stat(name: bytes, start: int, code: int, stack: int) -> None:
    raw = STATS % (name, start, code, stack)
    assert parse_stat(raw) == ProcessStat(start, (code, stack))


@given(NAMES, st.lists(U32, min_size=8, max_size=8), st.lists(U32, max_size=5))
@example(b"\nUid:\t0\t0\t0\t0\n", [1] * 8, [])
def test_a_name_is_no_line_of_status(name: bytes, ids: list[int], groups: list[int]) -> None:
    listed = b" ".join(b"%d" % group for group in groups)
    raw = STATUS % (escaped(name), *ids, listed)
    assert parse_status(raw) == ProcessOwner(ids[1], ids[5], frozenset(groups))


@given(TEXTS)
def test_any_stat_is_understood_or_refused(raw: bytes) -> None:
    with suppress(ValueError):
        assert parse_stat(raw).start_time >= 0


@given(TEXTS)
def test_any_status_is_understood_or_refused(raw: bytes) -> None:
    with suppress(ValueError):
        assert 0 <= parse_status(raw).uid < 2**32


@pytest.mark.parametrize("number", [b"-1", b"1_0", b"+1", b" ", b"4294967296", b"\xc2\xb2", b"x"])
def test_what_is_no_number_of_the_kernel_s_is_refused(number: bytes) -> None:
    text = STATUS.replace(b"%d", b"1").replace(b"%s", b"1")
    assert parse_status(text).uid == 1
    with pytest.raises(ValueError, match="not"):
        parse_status(text.replace(b"Uid:\t1\t1", b"Uid:\t1\t" + number))


@given(st.dictionaries(st.sampled_from([b"", b"name=systemd", b"cpu,cpuacct"]), PATHS))
def test_control_groups_are_read_whatever_they_are_called(groups: dict[bytes, bytes]) -> None:
    raw = b"".join(
        b"%d:%s:%s\n" % (number, name, path) for number, (name, path) in enumerate(groups.items())
    )
    assert parse_cgroup(raw) == {
        os.fsdecode(name): os.fsdecode(path) for name, path in groups.items()
    }


@given(TEXTS)
def test_any_control_groups_are_understood_or_refused(raw: bytes) -> None:
    try:
        groups = parse_cgroup(raw)
    except ValueError:
        return
    for id in container_ids(groups):
        assert len(id) == 64
        assert any(id in path for path in groups.values())
    for path in groups.values():
        assert "".join(segments(path)) == path.replace("/", "")
        user_of(path)
    kept = systemd_path(groups)
    if kept is None:
        return
    try:
        facts = facts_of(kept)
    except ValueError:
        return
    SelectorSyntax().check_all(selectors_of("systemd", facts))


@given(PATHS, st.binary(max_size=40))
def test_what_a_user_calls_his_groups_is_never_the_system_s(path: bytes, name: bytes) -> None:
    """Below user@1000.service, where anybody may make groups of any name."""
    prefix = "/user.slice/user-1000.slice/user@1000.service"
    own = os.fsdecode(path) + "/" + os.fsdecode(name).replace("/", "")
    facts = dict(facts_of(prefix + own))
    assert facts["id"] == "user@1000.service"
    assert facts["slice"] == "user-1000.slice"
    assert user_of(prefix + own) == 1000


@given(PATHS, PATHS, st.integers(0, 2**31))
def test_mounts_are_read_whatever_they_are_called(root: bytes, point: bytes, id: int) -> None:
    def mangled(text: bytes) -> bytes:
        for char in b" \t\n\\#":
            text = text.replace(bytes([char]), b"\\%03o" % char) if char != 92 else text
        return text

    # The kernel escapes the backslash as well; first, or it would escape its own escapes.
    line = b"%d 1 8:1 %s %s rw shared:1 - ext4 /dev/x rw\n" % (
        id,
        mangled(root.replace(b"\\", b"\\134")),
        mangled(point.replace(b"\\", b"\\134")),
    )
    (mount, again) = parse_mountinfo(line * 2)
    assert mount == again
    assert (mount.id, mount.root, mount.point) == (id, os.fsdecode(root), os.fsdecode(point))


@given(TEXTS)
def test_any_mounts_are_understood_or_refused(raw: bytes) -> None:
    with suppress(ValueError):
        parse_mountinfo(raw)
        assert all(len(id) == 64 for id in container_ids_of_mounts(raw))


HTTP = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(b"HTTP/1.1 200 OK\r\n", b"\r\n", b"Content-Length: ", b"5", b"\r\n\r\n", b"{}"),
                *(b"Transfer-Encoding: chunked\r\n", b"ffff", b"0\r\n\r\n", b":", b"HTTP/1.0 "),
            ]
        ),
        st.binary(max_size=30),
    ),
    max_size=12,
).map(b"".join)


@given(HTTP)
def test_any_answer_of_an_engine_is_understood_or_refused(raw: bytes) -> None:
    async def read() -> None:
        reader = asyncio.StreamReader(limit=1024)
        reader.feed_data(raw)
        reader.feed_eof()
        with suppress(EOFError, ValueError, asyncio.LimitOverrunError):
            status, body = await _response(reader)
            assert 0 <= status < 1000
            assert len(body) <= len(raw)

    asyncio.run(read())
