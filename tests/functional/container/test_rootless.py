"""Containers of an ordinary user, who has one ID and no subordinate ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence import _binaries
from ringfence.container import init_program
from tests.framework.bundles import make_bundle

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user"),
]

_UID = 54_321
_SOURCES = Path(__file__).resolve().parents[3] / "src"


def interpreter() -> str:
    """A Python that another user may run."""
    for path in (sys.executable, "/usr/bin/python3"):
        probe = [
            "setpriv",
            "--reuid",
            str(_UID),
            "--regid",
            str(_UID),
            "--clear-groups",
            path,
            "-c",
        ]
        # It must be able to start itself again, without the rights that setpriv starts it with.
        check = (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True); "
            "sys.exit(sys.version_info < (3, 11))"
        )
        if subprocess.run([*probe, check], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip("no Python 3.11 that other users may run")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of the user's, with the programs in it."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    programs = tmp_path / "bin"
    programs.mkdir()
    shutil.copy(init_program.find(), programs)
    shutil.copy(_binaries.find("ringfence-agent"), programs)
    home = tmp_path / "home"
    home.mkdir()
    return home


def as_user(home: Path, *words: str, status: int = 0) -> str:
    environment = {
        "HOME": str(home),
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(_SOURCES),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RINGFENCE_BIN_DIR": str(home.parent / "bin"),
        "RINGFENCE_HOME": str(home / "ringfence"),
    }
    done = subprocess.run(
        ["setpriv", "--reuid", str(_UID), "--regid", str(_UID), "--clear-groups", *words],
        env=environment, capture_output=True, text=True, timeout=60, check=False, cwd=home,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def owned(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, _UID, _UID, follow_symlinks=False)


def test_a_bundle_runs_with_a_single_map(home: Path) -> None:
    bundle = make_bundle(home / "b", "sh", "-c", "id -u; cat /proc/self/uid_map; echo > /f")
    config = bundle / "config.json"
    text = config.read_text()
    config.unlink()
    owned(home)
    script = "import sys; from ringfence.container.oci.main import main; sys.exit(main())"
    python = [interpreter(), "-c", script, "--root", str(home / "states")]

    as_user(home, *python, "spec", "--rootless", "--bundle", str(bundle))
    made = config.read_text()
    wanted = text[text.index('"args"') : text.index('"env"')]
    made = made[: made.index('"args"')] + wanted + made[made.index('"env"') :]
    config.write_text(
        made.replace('"terminal": true', '"terminal": false').replace(
            '"readonly": true', '"readonly": false'
        )
    )
    output = as_user(home, *python, "run", "--bundle", str(bundle), "one")

    assert output.split() == ["0", "0", str(_UID), "1"]
    assert (bundle / "rootfs/f").stat().st_uid == _UID
    assert list((home / "states").iterdir()) == []


def test_a_machine_runs_with_a_single_map(home: Path) -> None:
    owned(home)
    script = (
        "import ringfence\n"
        "with ringfence.Machine(engine='container', network='none') as machine:\n"
        "    done = machine.run(['sh', '-c', 'id -u; cat /proc/self/uid_map; echo x > /tmp/f; cat /tmp/f'])\n"
        "    print(done.stdout + done.stderr)\n"
    )

    output = as_user(home, interpreter(), "-c", script)

    assert output.split() == ["0", "0", str(_UID), "1", "x"]


def test_a_user_that_a_single_map_has_not_is_told_of(home: Path) -> None:
    owned(home)
    script = (
        "import ringfence\n"
        "with ringfence.Machine(engine='container', network='none') as machine:\n"
        "    done = machine.run(['id'], user='33:33')\n"
        "    print(done.exit_code, done.stderr)\n"
    )

    output = as_user(home, interpreter(), "-c", script)

    assert output.startswith("126 the user 33:33 has no number in this container")
