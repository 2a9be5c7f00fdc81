"""Scopes of systemd: their names and paths, and what systemd is told."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from ringfence.container.cgroups.systemd import Scope
from ringfence.container.fields import Fields
from ringfence.errors import ConfigError, HostError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("machine.slice:libpod:abc", "/machine.slice/libpod-abc.scope"),
        ("system.slice:docker:0f", "/system.slice/docker-0f.scope"),
        ("a-b-c.slice:p:n", "/a.slice/a-b.slice/a-b-c.slice/p-n.scope"),
        ("-.slice:p:n", "/p-n.scope"),
        (":cri:n", "/system.slice/cri-n.scope"),
        ("pod.slice:x:inner.slice", "/pod.slice/inner.slice"),
        ("", "/system.slice/ringfence-one.scope"),
    ],
)
def test_paths_are_those_that_systemd_makes(text: str, path: str) -> None:
    assert Scope(text, "one").path == path


@pytest.mark.parametrize(
    "text", ["/plain/path", "a:b", "machine:p:n", "a.slice:p:", "a.slice:p:../x"]
)
def test_other_paths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Scope(text, "one")


def test_an_ordinary_users_scopes_are_its_managers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    path = Scope("user.slice:p:n", "one").path

    assert path == "/user.slice/user-1000.slice/user@1000.service/user.slice/p-n.scope"


def test_limits_are_told_in_systemds_units() -> None:
    cpu = {"quota": 50_000, "period": 100_000}
    resources = Fields({"memory": {"limit": 1 << 20}, "pids": {"limit": -1}, "cpu": cpu})

    words = Scope("a.slice:p:n", "one").properties(7, resources)

    told = " ".join(words)
    assert "MemoryMax t 1048576" in told
    assert f"TasksMax t {2**64 - 1}" in told
    assert "CPUQuotaPerSecUSec t 500000" in told
    assert words[-4:] == ["PIDs", "au", "1", "7"]
    assert int(words[0]) == told.count(" b ") + told.count(" t ") + told.count(" s ") + 1


def test_what_systemd_refuses_is_told_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "busctl"
    program.write_text('#!/bin/sh\necho "$@" > "${0%/*}/called"\necho no such slice >&2\nexit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scope = Scope("a.slice:p:n", "one")

    with pytest.raises(HostError, match="no such slice"):
        scope.start(Fields({}))

    called = (tmp_path / "called").read_text()
    assert "StartTransientUnit ssa(sv)a(sa(sv)) p-n.scope replace" in called
    with pytest.raises(ChildProcessError):
        os.waitpid(int(called.split()[-2]), 0)
