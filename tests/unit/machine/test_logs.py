"""Logs: their bound, their streams, and following them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.machine import logs

if TYPE_CHECKING:
    from pathlib import Path


def joined(path: Path) -> bytes:
    return b"".join(chunk.data for chunk in logs.read(path))


def test_streams_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logs.LogWriter(path) as log:
        log.write(1, b"one\n")
        log.write(2, b"two\n")
    assert [(chunk.stream, chunk.data) for chunk in logs.read(path)] == [
        (1, b"one\n"),
        (2, b"two\n"),
    ]


def test_it_never_grows_beyond_two_halves(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logs.LogWriter(path, half_bytes=1000) as log:
        for number in range(500):
            log.write(1, b"%03d\n" % number)
    kept = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert kept <= 2000
    assert joined(path).endswith(b"498\n499\n")
    assert not joined(path).startswith(b"000")


def test_half_a_frame_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logs.LogWriter(path) as log:
        log.write(1, b"whole")
        log.write(1, b"torn")
    path.write_bytes(path.read_bytes()[:-2])
    assert joined(path) == b"whole"


def test_following_sees_what_comes_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logs.LogWriter(path, half_bytes=40) as log:
        log.write(1, b"before")
        asked = 0

        def ended() -> bool:
            nonlocal asked
            asked += 1
            if asked == 1:
                log.write(1, b" after")
                log.write(1, b" rotated")
            return asked > 2

        seen = b"".join(chunk.data for chunk in logs.follow(path, ended))
    assert seen == b"before after rotated"


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert logs.read(tmp_path / "none") == []
    assert list(logs.follow(tmp_path / "none", lambda: True)) == []
