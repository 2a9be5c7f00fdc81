"""What a machine does on a real KVM: run as a program by the Python that has the wheel installed.

python machine_checks.py KERNEL-VERSION
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence import Machine, RingfenceError

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = str(Path(sys.executable).with_name("ringfence"))
MEGABYTES = 100


def check_the_command_prints_the_guests_kernel(kernel: str) -> None:
    argv = [COMMAND, "run", "--engine", "kvm", "--", "uname", "-r"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{kernel}\n"), done


def check_statuses_signals_and_streams(machine: Machine) -> None:
    assert machine.run(["sh", "-c", "exit 7"]).exit_code == 7
    assert machine.run(["sh", "-c", "kill -9 $$"]).exit_code == 128 + 9
    assert machine.run(["/no/such/program"]).exit_code == 127
    text = "a line\n" * 10_000
    assert machine.run(["cat"], input=text).stdout == text


def check_much_output_arrives_whole(machine: Machine) -> None:
    script = f"yes 0123456789abcde | head -c {MEGABYTES << 20}"
    expected = hashlib.sha256(b"0123456789abcde\n" * (MEGABYTES << 16)).hexdigest()
    done = machine.run(["sh", "-c", script], timeout_s=120)
    assert hashlib.sha256(done.stdout_bytes).hexdigest() == expected


def check_both_processors_are_seen(machine: Machine) -> None:
    assert machine.run(["nproc"]).stdout == "2\n"


def check_files_go_in_and_out(machine: Machine) -> None:
    data = os.urandom(1 << 20)
    machine.files.write("/tmp/file", data)
    assert (
        machine.run(["sha256sum", "/tmp/file"]).stdout.split()[0]
        == hashlib.sha256(data).hexdigest()
    )
    assert machine.files.read("/tmp/file") == data


def check_a_killed_vm_process_is_noticed() -> None:
    with Machine(engine="kvm") as machine:
        os.kill(machine.entry.record.vm_pid, signal.SIGKILL)
        try:
            machine.run(["true"])
        except RingfenceError:
            return
    message = "a command ran in a machine whose process was killed"
    raise AssertionError(message)


def main() -> int:
    """Calls each check and says how many passed."""
    kernel = sys.argv[1]
    with Machine(engine="kvm", vcpus=2, memory="512M") as machine:
        checks: list[Callable[[], None]] = [
            partial(check_the_command_prints_the_guests_kernel, kernel),
            partial(check_statuses_signals_and_streams, machine),
            partial(check_much_output_arrives_whole, machine),
            partial(check_both_processors_are_seen, machine),
            partial(check_files_go_in_and_out, machine),
            check_a_killed_vm_process_is_noticed,
        ]
        failed = 0
        for check in checks:
            try:
                check()
            except Exception:
                traceback.print_exc()
                failed += 1
    sys.stdout.write(f"{len(checks) - failed} passed, {failed} failed\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
