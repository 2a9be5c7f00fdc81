"""Runs commands inside the nested host: the far end of :mod:`tests.framework.nested_host`.

Started by the nested host's init with the outer host's Python, so it uses the standard library
alone. One JSON line in is a command; one JSON line out is how it ended.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

PORT_NAME = "control"


def port() -> Path:
    """The device of the virtio serial port that is named for us."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == PORT_NAME:
            return Path("/dev") / entry.name
    message = "the nested host has no control port"
    raise SystemExit(message)


def run(request: dict[str, object]) -> dict[str, object]:
    """Runs one command to its end."""
    argv = [str(word) for word in request["argv"]]  # type: ignore[attr-defined]
    environment = {str(k): str(v) for k, v in request["env"].items()}  # type: ignore[attr-defined]
    limit = float(str(request["timeout_s"]))
    try:
        # A new session, so that a time-out ends what the command started too.
        with subprocess.Popen(
            argv,
            env=environment,
            cwd=str(request["cwd"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            stdin = base64.b64decode(str(request["stdin"]))
            timed_out = False
            try:
                stdout, stderr = process.communicate(stdin, limit)
            except subprocess.TimeoutExpired:
                timed_out = True
                os.killpg(process.pid, 9)
                stdout, stderr = process.communicate()
    except OSError as error:
        return {"error": f"cannot start {argv[0]}: {error}"}
    return {
        "status": process.returncode,
        "timed_out": timed_out,
        "stdout": base64.b64encode(stdout).decode(),
        "stderr": base64.b64encode(stderr).decode(),
    }


def main() -> None:
    """Serves commands until the other end closes."""
    with port().open("r+b", buffering=0) as control:
        control.write(b'{"ready": true}\n')
        pending = b""
        while chunk := control.read(65536):
            pending += chunk
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                answer = json.dumps(run(json.loads(line))).encode() + b"\n"
                while answer:
                    answer = answer[control.write(answer) :]


if __name__ == "__main__":
    main()
