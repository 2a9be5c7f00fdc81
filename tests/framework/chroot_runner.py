"""A runner of build steps for tests: chroot in namespaces of its own. Needs root; isolates little."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfence.image.build import RunStep

__all__ = ["ChrootRunner"]

_SCRIPT = 'root=$1; shift; mount -t proc proc "$root/proc" 2>/dev/null; cd "$root"; exec "$@"'


class ChrootRunner:
    """Runs steps, and counts them."""

    def __init__(self) -> None:
        self.steps: list[RunStep] = []

    def run(self, step: RunStep) -> int:
        """Run one."""
        self.steps.append(step)
        binds = "".join(
            f'mount --bind "{mount.source}" "{step.root}{mount.target}"; ' for mount in step.mounts
        )
        user = ["--userspec", step.user] if step.user else []
        inner = ["chroot", *user, str(step.root), "sh", "-c", 'cd "$0" && exec "$@"', step.workdir]
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", binds + _SCRIPT, "sh",
             str(step.root), *inner, *step.argv],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **step.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
        step.output(done.stdout)
        return done.returncode
