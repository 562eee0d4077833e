"""What a control group's path says, and what it does not."""

from __future__ import annotations

import pytest

from identity_broker.attestors.workload.cgroup import (
    parse_cgroup,
    parse_mountinfo,
    systemd_path,
    user_of,
)
from identity_broker.attestors.workload.docker import container_ids, container_ids_of_mounts
from identity_broker.attestors.workload.systemd import facts_of

ID = "0123456789abcdef" * 4
OTHER = "f" * 64
USER = "/user.slice/user-1000.slice/user@1000.service"


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("/", {}),
        ("/system.slice/orders.service", {"id": "orders.service", "slice": "system.slice"}),
        (
            "/system.slice/system-getty.slice/getty@tty1.service",
            {"id": "getty@tty1.service", "slice": "system-getty.slice"},
        ),
        # what a service makes of its own below it
        (
            "/system.slice/orders.service/workers/payments.service",
            {"id": "orders.service", "slice": "system.slice"},
        ),
        ("/orders.service", {"id": "orders.service", "slice": "-.slice"}),
        ("/init.scope", {"slice": "-.slice"}),
        ("/user.slice/user-1000.slice/session-3.scope", {"slice": "user-1000.slice"}),
        # a user's own units are never the system's
        (USER, {"id": "user@1000.service", "slice": "user-1000.slice"}),
        (
            f"{USER}/app.slice/payments.service",
            {
                "id": "user@1000.service",
                "slice": "user-1000.slice",
                "user_unit": "payments.service",
            },
        ),
        (
            f"{USER}/payments.service",
            {
                "id": "user@1000.service",
                "slice": "user-1000.slice",
                "user_unit": "payments.service",
            },
        ),
        (
            f"{USER}/system.slice/payments.service/x",
            {
                "id": "user@1000.service",
                "slice": "user-1000.slice",
                "user_unit": "payments.service",
            },
        ),
        # a service with such a name outside any slice is not the user's systemd
        ("/user@1000.service/payments.service", {"id": "user@1000.service", "slice": "-.slice"}),
        # containers, and systemd inside them
        (f"/system.slice/docker-{ID}.scope", {"slice": "system.slice"}),
        (f"/system.slice/docker-{ID}.scope/system.slice/a.service", {"slice": "system.slice"}),
        (f"/docker/{ID}", {}),
        (f"/docker/{ID}/system.slice/a.service", {}),
        ("/kubepods.slice/kubepods-besteffort.slice/x", {"slice": "kubepods-besteffort.slice"}),
        # "a-b.slice" can only be in "a.slice"
        ("/system.slice/user-1000.slice/a.service", {"slice": "system.slice"}),
        ("/a-b.slice/c.service", {}),
        ("/.slice/c.service", {}),
        # what systemd escapes
        ("/system.slice/_cpu.service", {"id": "cpu.service", "slice": "system.slice"}),
        (
            "/system.slice/system-a\\x2db.slice/c.service",
            {"id": "c.service", "slice": "system-a\\x2db.slice"},
        ),
        ("/system.slice/gone.service (deleted)", {"slice": "system.slice"}),
    ],
)
def test_the_unit_and_the_slice(path: str, facts: dict[str, str]) -> None:
    assert dict(facts_of(path)) == facts


def test_a_path_that_begins_outside_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="outside"):
        facts_of("/../system.slice/orders.service")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/system.slice/a.service\n", "/system.slice/a.service"),
        ("1:name=systemd:/system.slice/a.service\n", "/system.slice/a.service"),
        (
            "2:cpu,cpuacct:/x\n1:name=systemd:/system.slice/a.service\n0::/\n",
            "/system.slice/a.service",
        ),
        (
            "1:name=systemd:/system.slice/a.service\n0::/system.slice/a.service\n",
            "/system.slice/a.service",
        ),
        ("0::/a:b\n", "/a:b"),
        ("0::/\n", "/"),
        ("3:cpu:/x\n", None),
        ("", None),
    ],
)
def test_the_path_that_systemd_keeps(text: str, path: str | None) -> None:
    assert systemd_path(parse_cgroup(text.encode())) == path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (f"0::/docker/{ID}\n", [ID]),  # cgroupfs driver
        (f"0::/system.slice/docker-{ID}.scope\n", [ID]),  # systemd driver
        (f"0::/system.slice/docker-{ID}.scope/init.scope\n", [ID]),  # systemd inside
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", [ID]),  # podman
        (f"0::/libpod_parent/libpod-{ID}\n", [ID]),
        (f"0::/system.slice/app.service/libpod-payload-{ID}\n", [ID]),  # podman, split
        (f"0::/../docker-{ID}.scope\n", [ID]),  # an agent with a namespace of its own
        (f"12:pids:/docker/{ID}\n11:cpu,cpuacct:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", [ID]),
        (f"0::/docker/{OTHER}/docker/{ID}\n", [ID, OTHER]),  # an engine inside a container
        (f"0::/machine.slice/libpod-conmon-{ID}.scope\n", []),  # podman's watcher, outside
        (f"0::/docker/{ID[:-1]}\n", []),
        (f"0::/docker/{ID}0\n", []),
        (f"0::/docker/{ID.upper()}\n", []),
        (f"0::/docker/x{ID}\n", []),
        ("0::/system.slice/docker.service\n", []),
    ],
)
def test_the_containers_named(text: str, ids: list[str]) -> None:
    assert list(container_ids(parse_cgroup(text.encode()))) == ids


def test_the_containers_named_by_mounts() -> None:
    line = "700 600 8:1 {root} {point} rw,relatime - ext4 /dev/vda1 rw\n"
    docker = f"/var/lib/docker/containers/{ID}/hostname"
    podman = f"/var/lib/containers/storage/overlay-containers/{OTHER}/userdata/hosts"
    text = line.format(root=docker, point="/etc/hostname")
    assert container_ids_of_mounts(text.encode()) == (ID,)
    text += line.format(root=podman, point="/etc/hosts")
    assert container_ids_of_mounts(text.encode()) == (ID, OTHER)
    elsewhere = line.format(root=docker, point="/srv/a/hostname")
    assert container_ids_of_mounts(elsewhere.encode()) == ()
    assert container_ids_of_mounts(b"") == ()


@pytest.mark.parametrize(
    ("path", "user"),
    [
        (f"{USER}/app.slice/docker-{ID}.scope", 1000),
        ("/user.slice/user-1001.slice/session-3.scope", 1001),
        ("/system.slice/docker.service", None),
        (f"/docker/{ID}", None),
        ("/", None),
    ],
)
def test_whose_names_they_are(path: str, user: int | None) -> None:
    assert user_of(path) == user


def test_mounts_are_read_as_the_kernel_escapes_them() -> None:
    (mount,) = parse_mountinfo(
        b"36 35 98:0 /a\\040b\\011\\134 /mnt\\012x rw shared:1 master:2 - ext3 /dev/root rw\n"
    )
    assert (mount.id, mount.device, mount.root, mount.point) == (36, "98:0", "/a b\t\\", "/mnt\nx")
