"""CPython's own tests give in a guest what they give on the host."""

from __future__ import annotations

import re
import subprocess

import pytest

from ringfence import Machine

MODULES = (
    *("test_int", "test_long", "test_float", "test_struct", "test_threading", "test_signal"),
    *("test_mmap", "test_subprocess", "test_re", "test_json"),
)
TIMEOUT_S = 1800.0
COMMAND = (
    *("/usr/bin/python3", "-W", "ignore", "-m", "unittest", "-v"),
    *(f"test.{module}" for module in MODULES),
)
_RESULT = re.compile(
    r"^(\w+) \((test[\w.]*)\).*?\.\.\. (?:.*?\n)?.*?(ok|FAIL|ERROR|skipped)\b", re.MULTILINE
)


def _results(output: str) -> dict[str, str]:
    return {f"{match[2]}.{match[1]}": match[3] for match in _RESULT.finditer(output)}


@pytest.mark.parametrize("vcpus", [1, 2])
def test_cpythons_tests_give_what_they_give_on_the_host(vcpus: int) -> None:
    probe = ["/usr/bin/python3", "-c", "import test.test_int"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs CPython's tests: python3 tools/host_packages.py soak")
    host = subprocess.run(
        COMMAND, cwd="/tmp", capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    expected = _results(host.stderr)
    assert len(expected) > 500, host.stderr[-2000:]
    with Machine(engine="bt", vcpus=vcpus, memory="1G") as machine:
        guest = machine.run(COMMAND, workdir="/tmp", timeout_s=TIMEOUT_S)
        found = _results(guest.stderr)
        log = machine.run(["dmesg", "-l", "err,crit,alert,emerg"], check=True).stdout
    differing = {
        name: (expected.get(name), found.get(name))
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name)
    }
    assert differing == {}
    assert guest.exit_code == host.returncode
    assert log == ""
