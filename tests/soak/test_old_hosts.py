"""The ``bt`` engine's suite on an emulated processor that lacks what the translator would like to have."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.framework.nested_host import NestedHost

REPOSITORY = Path(__file__).resolve().parents[2]
# No PEXT and its kin, no FSGSBASE, no AVX and XSAVE, no PCID, nothing of the last ten years.
PROCESSOR = "EPYC,-xsave,-avx,-avx2,-fma,-f16c,-bmi1,-bmi2,-fsgsbase,-popcnt,-adx,-sse4.2,-movbe"
# QEMU's emulation raises no errors of x87 and SSE, and takes longer than the suite waits to notice ten thousand times
# that code was written over.
NOT_HERE = (
    "exceptions::sse_errors_are_xm",
    "exceptions::x87_errors_come_at_the_next_x87_instruction",
    "code::data_beside_code_can_be_written",
)


def _suite() -> Path:
    command = ["cargo", "test", "--locked", "--release", "--no-run", "--message-format=json"]
    command += ["-p", "ringfence-engine-bt", "--test", "conformance"]
    built = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    messages = map(json.loads, built.stdout.splitlines())
    return next(
        Path(message["executable"])
        for message in messages
        if message.get("executable") and message["target"]["name"] == "conformance"
    )


def test_the_engine_conforms_without_newer_instructions() -> None:
    skips = [word for name in NOT_HERE for word in ("--skip", name)]
    with NestedHost(cpus=2, processor=PROCESSOR) as host:
        done = host.run([_suite(), "--test-threads=2", *skips], timeout_s=900)
    output = done.stdout.decode()
    assert done.status == 0, output
    assert "test result: ok." in output
    assert f"{len(NOT_HERE)} filtered out" in output
