"""Containers where the kernel or its policy has no overlay: what is shared is copied or bound."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ringfence
from ringfence.container import host_tree
from ringfence.image import Store
from ringfence.machine import state
from tests.framework.bundles import busybox, make_root
from tests.functional.container.test_rootless import as_user, home, interpreter, owned
from tests.unit.image.images import layer, member, store_image

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ringfence.machine.driver import Place
    from ringfence.machine.spec import MachineSpec

__all__ = ["home"]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for control groups"),
]

_OPTION = "no_such_option"


@pytest.fixture
def without_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlays are mounted with an option that no kernel knows."""
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    root_plan = host_tree.root_plan

    def changed(
        spec: MachineSpec, place: Place, stack: ExitStack, *, own_users: bool
    ) -> dict[str, object]:
        plan = root_plan(spec, place, stack, own_users=own_users)
        overlay = plan["overlay"]
        assert isinstance(overlay, dict)
        overlay["options"] = [_OPTION]
        return plan

    monkeypatch.setattr(host_tree, "root_plan", changed)


@pytest.mark.usefixtures("without_overlay")
def test_the_hosts_programs_are_bound_and_its_settings_copied() -> None:
    script = """
        id -un; cat /etc/shadow; ls /usr/local/etc; touch /usr/x; echo new > /etc/new && cat /etc/new
        hostname > /tmp/name; cmp /etc/hostname /tmp/name && echo named
    """

    with ringfence.Machine(engine="container", network="none") as machine:
        done = machine.run(["sh", "-c", script])

    assert done.stdout.split() == ["root", "new", "named"]
    assert "/etc/shadow: No such file" in done.stderr
    assert "/usr/x': Read-only file system" in done.stderr
    assert not Path("/etc/new").exists()


@pytest.mark.usefixtures("without_overlay")
def test_an_images_layers_are_copied_and_gone_with_the_machine() -> None:
    program = busybox().read_bytes()
    shell = member("bin/sh", mode=0o755)
    links = [
        member(f"bin/{name}", tarfile.SYMTYPE, linkname="sh") for name in ("cat", "stat", "ls")
    ]
    low = layer(
        [
            (shell, program), *links, member("bin", tarfile.DIRTYPE),
            (member("gone"), b"x"), member("closed", tarfile.DIRTYPE),
            (member("closed/old"), b"x"), (member("mine", uid=33, gid=34, mode=0o640), b"mine"),
        ]
    )  # fmt: skip
    high = layer(
        [
            (member(".wh.gone"), b""), (member("closed/.wh..wh..opq"), b""),
            (member("closed/new"), b"new"),
        ]
    )  # fmt: skip
    store_image(Store(), "app:1", [low, high])
    script = "cat /closed/*; cat /gone; stat -c %u:%g:%a /mine; echo > /made; ls /closed"

    with ringfence.Machine(engine="container", image="app:1", network="none") as machine:
        done = machine.run(["sh", "-c", script])
        folder = machine.entry.path

    assert done.stdout.split() == ["new33:34:640", "new"]
    assert "can't open '/gone'" in done.stderr
    assert not folder.exists()


@pytest.mark.usefixtures("without_overlay")
def test_a_directory_is_copied_and_stays_as_it_is(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    before = sorted(root.rglob("*"))

    with ringfence.Machine(engine="container", root=root, network="none", keep=True) as machine:
        done = machine.run(["sh", "-c", "echo x > /new; cat /new"])
        copy = machine.entry.path / "copy"
        was_there = copy.is_dir()

    assert done.stdout == "x\n"
    assert sorted(root.rglob("*")) == before
    assert (was_there, copy.exists()) == (True, False)
    assert [entry.record.status for entry in state.list_machines()] == ["exited"]


def test_an_ordinary_users_too(home: Path) -> None:
    owned(home)
    script = f"""
import ringfence
from ringfence.container import host_tree
made = host_tree.root_plan
def changed(*words, **named):
    plan = made(*words, **named)
    plan["overlay"]["options"] = ["{_OPTION}"]
    return plan
host_tree.root_plan = changed
with ringfence.Machine(engine="container", network="none") as machine:
    print(machine.run(["sh", "-c", "id -u; cat /etc/shadow; echo x > /etc/new; cat /etc/new"]).stdout)
"""

    output = as_user(home, interpreter(), "-c", script)

    assert output.split() == ["0", "x"]
