"""Runs a command in a machine on this host, with the best engine it has, and says how long each phase took."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

COMMAND = 'uname -sr; echo "$(nproc) processor, $(id -un), process $$"; head -n1 /proc/meminfo'


def main() -> int:
    """Shows the host, then the machine."""
    ringfence = Path(sys.executable).with_name("ringfence")
    steps = (["doctor"], ["run", "--timing", "--", "sh", "-c", COMMAND])
    for arguments in steps:
        print(f"\n$ ringfence {subprocess.list2cmdline(arguments)}", flush=True)
        start = time.monotonic()
        status = subprocess.run([ringfence, *arguments], check=False).returncode
        print(f"[exit status {status}, {time.monotonic() - start:.2f} s]", flush=True)
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
