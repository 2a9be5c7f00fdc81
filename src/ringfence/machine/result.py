"""How a command in a machine ended."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Result"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A command that has ended.

    Args:
        argv: The command.
        exit_code: Its exit status; 128 + N when signal N ended it, 126 and 127 as a shell's.
        stdout_bytes: What it wrote.
        stderr_bytes: What it wrote there.
        timing: Seconds by part: ``start`` until it ran, ``run`` from there to its end.
    """

    argv: tuple[str, ...]
    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    timing: dict[str, float]

    @property
    def stdout(self) -> str:
        """What it wrote, as text; bytes that aren't UTF-8 are replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it wrote there, as text."""
        return self.stderr_bytes.decode(errors="replace")
