"""What the engine tells of itself: translations, names for perf, and the report of a bug."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence import _binaries
from ringfence.errors import ConfigError, InternalError
from ringfence.machine.document import Document
from ringfence.machine.driver import Place
from ringfence.machine.engine_notes import EngineNotes
from ringfence.machine.machine import Machine
from ringfence.machine.vm_process import VmProcess
from tests.framework.programs import vm_testing_program, write_minimal_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_a_trace_shows_the_guests_code_beside_its_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setenv("RINGFENCE_BT_TRACE", str(trace))
    monkeypatch.setenv("RINGFENCE_BT_DIRECT", "0")
    with Machine(engine="bt") as machine:
        machine.run(["true"], check=True)
    blocks = trace.read_text().split("\n# ")
    assert len(blocks) > 10_000
    kinds = {block.split(" code at ")[0].removeprefix("# ") for block in blocks}
    assert kinds == {"user", "kernel"}
    # A guest instruction at its place in the page, and the host's below it.
    whole = re.compile(
        r"kernel code at 0xffffffff\w+, physical 0x\w+\n(?: +\w+  \w+.*\n)+\w{3}: \w+.*\n +\w+  \w+"
    )
    assert sum(bool(whole.match(block)) for block in blocks) > 1000


@pytest.fixture
def perf_maps() -> Iterator[set[Path]]:
    before = set(Path("/tmp").glob("*.map"))
    found: set[Path] = set()
    yield found
    for path in set(Path("/tmp").glob("*.map")) - before:
        found.add(path)
        path.unlink()


@pytest.mark.usefixtures("perf_maps")
def test_perf_finds_the_names_of_translated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_BT_PERF", "1")
    with Machine(engine="bt") as machine:
        outer = machine.entry.record.vm_pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        pid = int(children[0]) if children else outer
        # Only in executable memory that no file stands for does it look names up.
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert re.search(r" r-xs .* /dev/zero \(deleted\)", maps)
        lines = Path(f"/tmp/perf-{pid}.map").read_text().splitlines()
    assert len(lines) > 10_000
    assert all(re.fullmatch(r"[0-9a-f]+ [0-9a-f]+ guest_\w+_[0-9a-f]+", line) for line in lines)


def test_every_counter_is_described() -> None:
    with Machine(engine="bt") as machine:
        counters = machine.stats(engine_counters=True)["engine"]
    assert isinstance(counters, dict)
    page = (REPOSITORY / "docs/reference/bt-counters.md").read_text()
    described = set(re.findall(r"`(\w+)`", page.partition("|---|---|")[2]))
    assert described | {"code_bytes"} == set(counters)
    assert counters["table_hits"] > counters["table_fills"] > 0


def test_an_engine_that_translates_nothing_has_no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_BT_PERF", "1")
    with (
        pytest.raises(ConfigError, match="kvm translates nothing"),
        Document(name="m", engine="kvm", memory_mib=64, vcpus=1) as document,
    ):
        EngineNotes(document, "kvm")


def test_a_bug_in_an_engine_leaves_a_report(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_binaries, "find", lambda _: vm_testing_program())
    place = Place(machine_id="m", name="m", folder=home, sockets=home)
    document = Document(name="m", engine="broken", memory_mib=64, vcpus=1)
    with document:
        kernel = write_minimal_kernel(home / "kernel")
        document.set("boot", {"kernel_fd": document.give_file(kernel)})
        process = VmProcess(document, place)
        ending = process.wait(30)
    assert ending is not None
    assert ending.reason == "failed"
    assert "engine bug: two and two are five" in ending.message
    assert isinstance(process.failure(), InternalError)
    process.kill()
    [path] = (home / "state/ringfence/reports").iterdir()
    assert str(path) in ending.message
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert "engine bug: two and two are five" in text
    assert re.search(r"^rip 0x\w+ rflags", text, re.MULTILINE)
    assert re.search(r"^code \w{16} ", text, re.MULTILINE)
