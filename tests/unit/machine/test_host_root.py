"""What of the host's ``/etc`` a guest doesn't see, and who it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.machine import host_root
from ringfence.machine.document import Document

if TYPE_CHECKING:
    from pathlib import Path

ACCOUNTS = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
alice:$6$secret:1000:1000:Alice,,,:/home/alice:/bin/bash
nobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
broken line
"""
GROUP = "root:x:0:\nsudo:x:27:alice\nalice:x:1000:\nnogroup:x:65534:\n"


def make_etc(folder: Path) -> Path:
    etc = folder / "etc"
    for name in ("ssh", "ssl/private", "ssl/certs", "app"):
        (etc / name).mkdir(parents=True)
    for name in ("shadow", "ssh/ssh_host_key", "ssl/certs/ca.pem", "app/open", "app/closed"):
        (etc / name).write_text("x")
        (etc / name).chmod(0o644)
    (etc / "app/closed").chmod(0o640)
    (etc / "ssl/private").chmod(0o700)
    (etc / "passwd").write_text(ACCOUNTS)
    (etc / "group").write_text(GROUP)
    return etc


def test_secrets_are_hidden_by_name_and_by_mode(tmp_path: Path) -> None:
    hidden = host_root.hidden_in_etc(make_etc(tmp_path))
    assert {"shadow", "ssh", "ssl/private", "app/closed", "resolv.conf"} <= hidden
    assert not hidden & {"ssl", "ssl/certs", "app", "app/open", "passwd", "group"}


def test_nothing_hidden_lies_below_another(tmp_path: Path) -> None:
    etc = make_etc(tmp_path)
    (etc / "ssl").chmod(0o700)
    hidden = host_root.hidden_in_etc(etc)
    assert "ssl" in hidden
    assert "ssl/private" not in hidden


def test_accounts_of_people_and_passwords_stay_outside(tmp_path: Path) -> None:
    lines = host_root.passwd_lines(make_etc(tmp_path) / "passwd")
    assert [line.split(":")[0] for line in lines] == ["root", "daemon", "nobody"]
    assert not any("secret" in line or "alice" in line for line in lines)
    assert {line.split(":")[1] for line in lines} == {"x"}


def test_groups_have_no_members(tmp_path: Path) -> None:
    lines = host_root.group_lines(make_etc(tmp_path) / "group")
    assert lines == ["root:x:0:\n", "sudo:x:27:\n", "nogroup:x:65534:\n"]


def test_a_host_without_accounts_has_root(tmp_path: Path) -> None:
    assert host_root.passwd_lines(tmp_path / "none") == ["root:x:0:0:root:/root:/bin/sh\n"]
    assert host_root.group_lines(tmp_path / "none") == ["root:x:0:\n"]


def test_only_what_is_named_is_in_the_tree(tmp_path: Path) -> None:
    etc = make_etc(tmp_path)
    for name in ("usr/bin", "usr/local", "home/alice", "root", "lib64", "var/lib/docker"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    with Document(name="x", engine="bt", memory_mib=64, vcpus=1) as document:
        entries = host_root.entries(document, tmp_path, etc=etc, root=tmp_path)
    shared = {str(entry["path"]) for entry in entries if "fd" in entry}
    assert shared == {"usr", "lib64", "etc", "etc/passwd", "etc/group", "etc/machine-id"}
    assert {"path": "bin", "symlink": "usr/bin"} in entries
    assert {"path": "home", "directory": True} in entries
    assert all(entry["ids"] == "squash:0:0" for entry in entries if "fd" in entry)
