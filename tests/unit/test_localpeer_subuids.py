from __future__ import annotations

import os
from pathlib import Path

from identity_broker.localpeer.subuids import SubordinateUids


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_uid_of_a_range_is_its_first(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("anna:100000:65536\nben:165536:65536\n1000:500000:10\n")
    subuids = SubordinateUids(file)
    expected = {
        0: 0,
        1000: 1000,
        99_999: 99_999,
        100_000: 100_000,
        165_535: 100_000,
        165_536: 165_536,
        231_071: 165_536,
        231_072: 231_072,
        500_009: 500_000,
        500_010: 500_010,
    }
    assert {uid: subuids.user_of(uid) for uid in expected} == expected


def test_ranges_that_overlap_are_one_and_nonsense_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_bytes(
        b"a:100:50\nb:120:100\nc:220:5\nd:130:5\n\n# no\nx:300\nx:-4:5\nx:400:0\n"
        b"x:9" + b"9" * 5000 + b":1\n\xff:500:5\ny:\xd9\xa1:5\n"
    )
    subuids = SubordinateUids(file)
    expected = {99: 99, 149: 100, 219: 100, 220: 220, 224: 220, 300: 300, 400: 400, 504: 500}
    assert {uid: subuids.user_of(uid) for uid in expected} == expected


def test_a_file_that_comes_changes_and_goes(tmp_path: Path) -> None:
    file, time = tmp_path / "subuid", Time()
    subuids = SubordinateUids(file, now=time)
    assert subuids.user_of(150) == 150
    file.write_text("a:100:100\n")
    assert subuids.user_of(150) == 150  # not looked at again so soon
    time.now = 61
    assert subuids.user_of(150) == 100
    time.now = 122
    file.write_text("a:140:1000\n")
    assert subuids.user_of(150) == 140
    time.now = 183
    file.unlink()
    file.mkdir()  # unreadable: what was known counts
    assert subuids.user_of(150) == 140
    file.rmdir()
    time.now = 244
    assert subuids.user_of(150) == 150
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
    time.now = 305
    assert subuids.user_of(150) == 150
