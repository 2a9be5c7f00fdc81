from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest

from ringfence.cli import main
from ringfence.image import Store
from tests.unit.image.images import files, layer, member, store_image

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    return Store()


def test_images_by_hand(
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upper = layer([(member("b"), b"2"), member(".wh.a")])
    store_image(store, "app:1", [files({"a": b"1"}), upper], created="2020-01-01T00:00:00Z")
    assert main(["image", "ls"]) == 0
    assert "app:1" in capsys.readouterr().out
    assert main(["image", "diff", "app:1"]) == 0
    assert capsys.readouterr().out == "D /a\nA /b\n"
    out = tmp_path / "out.tar"
    assert main(["image", "export", "-o", str(out), "--as", "docker-archive", "app:1"]) == 0
    assert main(["image", "tag", "app:1", "host.example/app:2"]) == 0
    assert main(["image", "rm", "app:1"]) == 0
    assert main(["image", "rm", "host.example/app:2"]) == 0
    assert main(["image", "prune"]) == 0
    capsys.readouterr()
    assert main(["image", "import", str(out), "--name", "back:3"]) == 0
    assert capsys.readouterr().out == "back:3\n"
    assert main(["image", "inspect", "back:3"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["config"]["created"] == "2020-01-01T00:00:00Z"


@pytest.mark.usefixtures("store")
@pytest.mark.usefixtures("store")
def test_failures_have_a_status_and_a_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["image", "inspect", "absent"]) == 125
    assert "hint: ringfence image pull absent" in capsys.readouterr().err
    assert main(["image", "tag", "absent", "Bad Name"]) == 2


@pytest.mark.usefixtures("store")
@pytest.mark.usefixtures("store")
def test_login_is_kept_for_this_user_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    assert main(["image", "login", "-u", "me", "--password-stdin", "host.example:5000"]) == 0
    path = tmp_path / "home" / "config" / "auth.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {
        "auths": {"host.example:5000": {"auth": "bWU6c2VjcmV0"}},
    }
