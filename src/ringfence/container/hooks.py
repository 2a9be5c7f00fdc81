"""Hooks that run on the host: prestart, createRuntime, poststart, poststop."""

from __future__ import annotations

from ringfence.container import lean_json
from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

__all__ = ["inside", "run"]


def inside(config: Fields, name: str) -> list[dict[str, object]]:
    """Hooks that the setup program runs in the container's namespaces, as its plan has them."""
    return [
        {
            "path": hook.text("path"),
            "args": hook.texts("args"),
            "env": hook.texts("env"),
            "timeout": hook.optional_integer("timeout"),
        }
        for hook in config.table("hooks").tables(name)
    ]


def run(config: Fields, name: str, state: dict[str, object]) -> None:
    """Runs hooks in turn with the container's state on their standard input.

    Args:
        config: The container's configuration.
        name: Which hooks.
        state: The state document.

    Raises:
        HostError: One failed or took too long; those after it don't run.
    """
    hooks = list(config.table("hooks").tables(name))
    if not hooks:
        return
    import subprocess

    text = lean_json.dumps(state).encode()
    for number, hook in enumerate(hooks):
        place = f"error running {name} hook #{number}: {hook.text('path')}"
        path = hook.text("path")
        environment = dict(pair.split("=", 1) for pair in hook.texts("env") if "=" in pair)
        try:
            done = subprocess.run(
                hook.texts("args") or [path],
                executable=path,
                input=text,
                env=environment,
                capture_output=True,
                timeout=hook.optional_integer("timeout"),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            message = f"{place} took longer than {error.timeout} s"
            raise HostError(message) from error
        except OSError as error:
            message = f"{place}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=path) from error
        if done.returncode:
            output = (done.stderr or done.stdout)[-500:].decode(errors="replace").strip()
            message = f"{place} failed: exit status {done.returncode}: {output}"
            raise HostError(message)
