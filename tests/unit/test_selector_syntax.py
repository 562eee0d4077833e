"""Selectors: what attestors can vouch for is taken, what they cannot is refused with advice."""

from __future__ import annotations

import pytest

from identity_broker.domain.selector import Selector
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import EntryInvalid

DIGEST = "0123456789abcdef" * 4


def refusal(text: str, syntax: SelectorSyntax | None = None) -> EntryInvalid:
    with pytest.raises(EntryInvalid) as refused:
        (syntax or SelectorSyntax()).check(Selector.parse(text))
    return refused.value


@pytest.mark.parametrize(
    "text",
    [
        "unix:uid:0",
        "unix:uid:4294967294",
        "unix:gid:1000",
        "unix:supplementary_gid:27",
        "unix:user:www-data",
        "unix:user:EXAMPLE\\orders",
        "unix:group:domain users",
        "unix:supplementary_group:docker",
        "unix:path:/usr/bin/python3.11",
        "unix:path:/opt/a b/c:d",
        f"unix:sha256:{DIGEST}",
        "systemd:id:orders.service",
        "systemd:id:getty@tty1.service",
        "systemd:id:dbus-org.freedesktop.login1.service",
        "systemd:id:home-a\\x2db.service",
        "systemd:user_unit:orders.service",
        "systemd:slice:system.slice",
        "systemd:slice:-.slice",
        "docker:label:com.example.app:orders",
        "docker:label:empty:",
        "docker:label:url:https://example.org:80/x",
        "docker:env:STAGE=production",
        "docker:env:EMPTY=",
        "docker:env:A=b=c",
        "docker:image_id:orders",
        "docker:image_id:registry.example.org:5000/team/orders:1.4",
        f"docker:image_id:sha256:{DIGEST}",
        f"docker:image_digest:sha256:{DIGEST}",
        "join_token:name:web-1",
        "join_token:name:web-1_a.B",
        "x509_pop:serial:1f3a",
        "x509_pop:serial:0",
        f"x509_pop:fingerprint:{DIGEST}",
        "x509_pop:subject:cn:Machine 1: the first",
        "x509_pop:san:dns:web-1.example.org",
        f"x509_pop:ca:fingerprint:{DIGEST}",
    ],
)
def test_what_attestors_vouch_for_is_taken(text: str) -> None:
    SelectorSyntax().check(Selector.parse(text))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("unix:uid:01000", "unix:uid:1000"),
        ("unix:uid:000", "unix:uid:0"),
        ("unix:uid: 7", "unix:uid:7"),
        ("unix:uuid:1000", "unix:uid:1000"),
        ("unix:grup:www-data", "unix:group:www-data"),
        ("unx:uid:1000", "unix:uid:1000"),
        ("uid:1000", "unix:uid:1000"),
        ("path:/usr/bin/orders", "unix:path:/usr/bin/orders"),
        ("unix:path:/usr//bin/../bin/orders/", "unix:path:/usr/bin/orders"),
        ("unix:path://usr/bin/orders", "unix:path:/usr/bin/orders"),
        (f"unix:sha256:{DIGEST.upper()}", f"unix:sha256:{DIGEST}"),
        (f"unix:sha256:sha256:{DIGEST}", f"unix:sha256:{DIGEST}"),
        ("systemd:id:nginx", "systemd:id:nginx.service"),
        ("systemd:slice:system", "systemd:slice:system.slice"),
        ("docker:label:app=orders", "docker:label:app:orders"),
        ("docker:env:STAGE:production", "docker:env:STAGE=production"),
        ("docker:image:orders", "docker:image_id:orders"),
        (f"docker:image_digest:{DIGEST}", f"docker:image_digest:sha256:{DIGEST}"),
        ("join_token:web-1", "join_token:name:web-1"),
        ("jointoken:name:web-1", "join_token:name:web-1"),
        ("x509_pop:serial:00:1F:3A", "x509_pop:serial:1f3a"),
        (f"x509_pop:fingerprnt:{DIGEST}", f"x509_pop:fingerprint:{DIGEST}"),
    ],
)
def test_a_slip_of_the_pen_is_named(text: str, meant: str) -> None:
    assert f'did you mean "{meant}"?' in refusal(text).hint


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("k8s:ns:default", 'type "k8s"', "entries.selector_types"),
        ("unix:uid:-1", "wants a number", "unix:uid:1000"),
        ("unix:uid:4294967295", "wants a number", "unix:uid:1000"),
        ("unix:uid:99999999999999999999", "wants a number", "unix:uid:1000"),
        ("unix:uid:١", "wants a number", "unix:uid:1000"),  # noqa: RUF001 - a digit, not ASCII
        ("unix:uid:root", "wants a number", "unix:uid:1000"),
        ("unix:uid:", "wants a number", ""),
        ("unix:uid", "does not vouch", "uid, gid"),
        ("unix:1000", "does not vouch", "uid, gid"),
        ("unix:user:a:b", "without a colon", ""),
        (f"unix:user:{'a' * 257}", "without a colon", ""),
        ("unix:path:bin/orders", "absolute path", ""),
        ("unix:path:/", "absolute path", ""),
        ("unix:sha256:abc", "64 lower-case", ""),
        ("systemd:id:.service", "service unit", ""),
        ("systemd:id:a/b.service", "service unit", ""),
        (f"systemd:id:{'a' * 256}.service", "service unit", ""),
        ("systemd:id:session-1.scope", "service unit", ""),
        ("docker:label:novalue", "NAME:VALUE", ""),
        ("docker:label::x", "NAME:VALUE", ""),
        ("docker:env:=x", "NAME=VALUE", ""),
        ("docker:image_id:a b", "image", ""),
        ("docker:image_digest:sha512:abc", "sha256:", ""),
        ("join_token:name:a/b", "joined under", ""),
        ("x509_pop:subject:o:Example", "does not vouch", "subject:cn"),
        ("x509_pop:serial:xyz", "hexadecimal", ""),
    ],
)
def test_what_no_attestor_can_vouch_for_is_refused(text: str, says: str, hint: str) -> None:
    error = refusal(text)
    assert says in error.public
    assert error.hint
    assert hint in error.hint


def test_types_of_other_attestors_are_taken_as_they_are() -> None:
    syntax = SelectorSyntax({"rack", "unix"})
    syntax.check(Selector.parse("rack:anything at all"))
    syntax.check(Selector.parse("unix:uid:seven"))
    assert "rack" in refusal("tpm:x", syntax).hint
    assert 'did you mean "rack:7"?' in refusal("rak:7", syntax).hint


def test_all_of_a_set_are_checked() -> None:
    good, bad = Selector.parse("unix:uid:1"), Selector.parse("unix:uid:one")
    SelectorSyntax().check_all({good})
    with pytest.raises(EntryInvalid):
        SelectorSyntax().check_all({good, bad})


def test_a_long_selector_is_cut_where_it_is_shown() -> None:
    error = refusal(f"docker:label:{'x' * 900}")
    assert len(error.public) + len(error.hint) < 400
