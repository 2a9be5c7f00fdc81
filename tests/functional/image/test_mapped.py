"""An ordinary user with subordinate IDs unpacks an image with its owners."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ringfence.image import Store
from ringfence.image.export import export_images
from tests.unit.image.images import layer, member, store_image

USER = 54321
REPOSITORY = Path(__file__).resolve().parents[3]

PROGRAM = """
import os, sys
from pathlib import Path
from ringfence.image import Store
from ringfence.image.archives import import_images

store = Store(Path(sys.argv[1]))
(tag,) = import_images(store, Path(sys.argv[2]))
image = store.get(tag.name)
with store.rootfs(image, mapped=True) as tree:
    (root,) = tree.layers
    for name in (".", "mine", "theirs", "theirs/secret"):
        status = (root / name).stat() if name != "theirs/secret" else None
        if status is not None:
            print(name, status.st_uid, status.st_gid, oct(status.st_mode & 0o7777))
    try:
        os.listdir(root / "theirs")
    except PermissionError:
        print("theirs is closed to us")
store.remove(tag.name)
print(store.prune().layers, len(list((store.root / "layers").iterdir())))
print(len(list((store.root / "tmp").iterdir())))
"""


@pytest.mark.root
def test_owners_without_root(tmp_path: Path) -> None:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if os.geteuid() != 0 or shutil.which("newuidmap") is None or python is None:
        pytest.skip("needs root to become another user, newuidmap and the system's Python")
    origin = Store(tmp_path / "origin")
    tar = layer(
        [
            (member("mine", mode=0o4755), b"m"),
            member("theirs", b"5", mode=0o700, uid=33, gid=34),
            (member("theirs/secret", mode=0o600, uid=33, gid=34), b"s"),
        ],
    )
    store_image(origin, "app:1", [tar])
    place = Path("/tmp") / f"rf-mapped-{os.getpid()}"
    place.mkdir()
    try:
        export_images(origin, ["app:1"], place / "app.tar")
        os.chown(place, USER, USER)
        (place / "app.tar").chmod(0o644)
        (place / "ids").write_text(f"{USER}:700000:65536\n")
        (place / "passwd").write_text(
            f"{Path('/etc/passwd').read_text()}mapped:x:{USER}:{USER}::{place}:/bin/sh\n",
        )
        # The host's own files stay as they are: ours lie over them in a namespace of our own.
        script = (
            'mount --bind "$0/ids" /etc/subuid && mount --bind "$0/ids" /etc/subgid && '
            'mount --bind "$0/passwd" /etc/passwd && '
            f"exec setpriv --reuid={USER} --regid={USER} --clear-groups "
            f'env HOME="$0" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={REPOSITORY}/src '
            f'{python} -c "$1" "$0/store" "$0/app.tar"'
        )
        command = ["unshare", "--mount", "sh", "-c", script, str(place), PROGRAM]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f". {USER} {USER} 0o755",
            f"mine {USER} {USER} 0o4755",
            "theirs 700032 700033 0o700",
            "theirs is closed to us",
            "1 0",
            "0",
        ]
    finally:
        shutil.rmtree(place)
