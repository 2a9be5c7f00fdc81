"""Records of machines: names, healing, half-made ones."""

from __future__ import annotations

import os
import pathlib
import time
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConflictError, HostError, NotFoundError
from ringfence.machine import names, state

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("home")


def make(name: str = "", *, remove: bool = False) -> state.Entry:
    return state.create(state.Record(id=names.new_id(), name=name, remove=remove))


def test_a_record_comes_back_as_it_was_written() -> None:
    entry = make("one")
    entry.update(status="running", command=("sleep", "1"), env=(("A", "b"),), vm_pid=7)
    (found,) = state.list_machines()
    assert found.record == entry.record
    assert found.is_held()


def test_a_machine_without_its_holder_has_exited() -> None:
    entry = make("one")
    entry.update(status="running")
    entry.sockets.mkdir(parents=True)
    entry.release()
    found = state.find("one")
    assert found.record.status == "exited"
    assert "holder" in found.record.error or "held" in found.record.error
    assert not entry.sockets.exists()


def test_one_that_was_to_be_removed_is() -> None:
    make("one", remove=True).release()
    assert state.list_machines() == []
    assert make("one").record.name == "one"


def test_a_killed_holder_is_noticed() -> None:
    child = os.fork()
    if child == 0:
        make("orphan").update(status="running")
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert state.find("orphan").record.status == "exited"


def test_a_half_made_one_goes_once_it_is_old(home: Path) -> None:
    folder = home / "state/machines/0123456789ab"
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text('{"id": "0123')
    assert state.list_machines() == []
    assert folder.exists()
    os.utime(folder, (time.time() - 60,) * 2)
    assert state.list_machines() == []
    assert not folder.exists()


def test_names_and_beginnings_of_ids_find_it() -> None:
    first, second = make("one"), make("two")
    assert state.find("one").record.id == first.record.id
    assert state.find(second.record.id[:6]).record.name == "two"
    with pytest.raises(NotFoundError, match="no machine 'three'"):
        state.find("three")
    with pytest.raises(NotFoundError):
        state.find("")


def test_a_taken_name_is_refused_with_the_remedy() -> None:
    make("one")
    with pytest.raises(ConflictError) as error:
        make("one")
    assert error.value.hint.endswith("ringfence rm -f one")


def test_made_up_names_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "new_name", lambda: "calm-owl")
    found = {make().record.name for _ in range(3)}
    assert len(found) == 3
    assert "calm-owl" in found


def test_an_unknown_field_of_a_newer_version_is_no_harm() -> None:
    entry = make("one")
    text = (entry.path / "machine.json").read_text()
    (entry.path / "machine.json").write_text(text.replace("{", '{"colour": "red",', 1))
    assert state.find("one").record.name == "one"


def test_a_full_disk_leaves_no_half_made_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(HostError, match="No space left on device"):
        make("one")
    assert [path.name for path in (home / "state/machines").iterdir()] == [".names"]
