"""Hostile members of a guest's tar stream, with Python's own filter and without it."""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import FormatError
from ringfence.guest import tarstream

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["with", "without"], autouse=True)
def _filter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode, made.uid = kind, link, 0o4755, 12345
    return made


def stream(*members: tarfile.TarInfo) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for made in members:
            archive.addfile(made)
    return whole.getvalue()


@pytest.mark.parametrize(
    "bad",
    [
        member("../x"),
        member("a/../../x"),
        member("a", tarfile.SYMTYPE, "../.."),
        member("a", tarfile.LNKTYPE, "../x"),
        member("a", tarfile.CHRTYPE),
    ],
)
def test_what_leads_out_is_refused(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    with pytest.raises(FormatError):
        tarstream.unpack(iter([stream(bad)]), "a", folder / "b")
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize(
    "tree",
    [
        [
            member("a", tarfile.DIRTYPE),
            member("a/here", tarfile.SYMTYPE, "."),
            member("a/up", tarfile.SYMTYPE, "here/here/../.."),
            member("a/up/x"),
        ],
        [
            member("a", tarfile.DIRTYPE),
            member("a/here", tarfile.SYMTYPE, "."),
            member("a/here/here/up", tarfile.SYMTYPE, "../../.."),
            member("a/up/x"),
        ],
    ],
    ids=["up through a link", "a link behind links"],
)
def test_links_that_lead_out_together_are_refused(
    tmp_path: Path, tree: list[tarfile.TarInfo]
) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    with pytest.raises(FormatError):
        tarstream.unpack(iter([stream(*tree)]), "a", folder / "b")
    assert list(tmp_path.rglob("*")) == [folder]


def test_what_stays_is_ours_and_sets_no_ids(tmp_path: Path) -> None:
    tree = [member("a", tarfile.DIRTYPE), member("a/f"), member("a/l", tarfile.SYMTYPE, "f")]
    tarstream.unpack(iter([stream(*tree)]), "a", tmp_path / "b")
    status = (tmp_path / "b/f").stat()
    assert status.st_mode & 0o7777 == 0o755
    assert status.st_uid == os.geteuid()
    assert (tmp_path / "b/l").readlink().name == "f"
