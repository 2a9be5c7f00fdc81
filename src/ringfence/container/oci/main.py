"""The runtime's entry: global options, the command, and errors as engines read them."""

from __future__ import annotations

import os
import sys

from ringfence.container.container import now
from ringfence.container.oci.options import Arguments, parse
from ringfence.container.state import default_root
from ringfence.errors import ConfigError, RingfenceError

__all__ = ["main"]

_VERSION = "1.1.5"
_SPEC = "1.2.0"
_NAME = "ringfence-oci"
# What follows a command's options, where it isn't one container.
_OPERANDS = {
    "exec": " ID [COMMAND...]",
    "features": "",
    "kill": " ID [SIGNAL]",
    "list": "",
    "ps": " ID [PS-OPTIONS...]",
    "spec": "",
}
_GLOBAL = ("log log-format root criu rootless engine", "debug systemd-cgroup version/v help/h")
# Command: its module, with a function of the command's name in it.
_COMMANDS = {
    "create": "lifecycle",
    "start": "lifecycle",
    "run": "lifecycle",
    "state": "lifecycle",
    "kill": "lifecycle",
    "delete": "lifecycle",
    "exec": "execute",
    "pause": "control",
    "resume": "control",
    "update": "control",
    "list": "query",
    "ps": "query",
    "events": "events",
    "features": "query",
    "spec": "query",
}


def _load(module: str, name: str) -> object:
    # Imported by name, so that a command loads its own code alone.
    loaded = __import__(f"ringfence.container.oci.{module}", fromlist=[name])
    return getattr(loaded, name)


def main(words: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    options = Arguments({}, [])
    command = ""
    try:
        options = parse(words, *_GLOBAL, ordered=True)
        if "version" in options:
            sys.stdout.write(_version())
            return 0
        if "help" in options or not options.rest:
            sys.stdout.write(_help())
            return 0
        command = options.rest[0]
        if _wants_help(command, options.rest[1:]):
            sys.stdout.write(_help_of(command))
            return 0
        return _run(command, options)
    except RingfenceError as error:
        _report(options, command, str(error))
    except OSError as error:
        _report(options, command, f"{error.strerror}: {error.filename or command}")
    except BrokenPipeError:
        return 1
    # As runc: one is what the command in the container may have ended with.
    return 255 if command == "exec" else 1


def _wants_help(command: str, words: list[str]) -> bool:
    """Whether a command's own options ask for help, not those of a program that it is to run."""
    own = words[:1] if command in {"exec", "ps"} else words
    return "-h" in own or "--help" in own


def _help_of(command: str) -> str:
    if command not in _COMMANDS:
        message = f"No help topic for '{command}'"
        raise ConfigError(message)
    function = _load(_COMMANDS[command], f"{command}_command")
    meaning = (function.__doc__ or "").partition("\n")[0].rstrip(".")
    usage = f"{_NAME} {command} [OPTIONS]{_OPERANDS.get(command, ' ID')}"
    return f"NAME:\n   {_NAME} {command} - {meaning}\n\nUSAGE:\n   {usage}\n"


def _run(command: str, options: Arguments) -> int:
    if command not in _COMMANDS:
        message = f"there is no command {command!r}; ringfence-oci --help lists them"
        raise ConfigError(message)
    if "systemd-cgroup" in options and not _has_systemd():
        message = "systemd not running on this host, cannot use systemd cgroups manager"
        raise ConfigError(message)
    function = _load(_COMMANDS[command], f"{command}_command")
    if not callable(function):
        message = f"the command {command} isn't there"
        raise ConfigError(message)
    root = os.path.abspath(options.text("root") or default_root())
    words = options.rest[1:]
    if command in {"create", "run"}:
        if "engine" in options:
            words = ["--engine", options.text("engine"), *words]
        if "systemd-cgroup" in options:
            words = ["--systemd-cgroup", *words]
    return int(function(root, words))


def _has_systemd() -> bool:
    from ringfence.container.cgroups import systemd

    return systemd.is_running()


def _version() -> str:
    return f"ringfence-oci version {_package_version()}\nspec: {_SPEC}\n"


def _package_version() -> str:
    try:
        from importlib.metadata import PackageNotFoundError, version
    except ImportError:
        return "unknown"
    try:
        return version("ringfence")
    except PackageNotFoundError:
        return "0.1.0"


def _help() -> str:
    commands = " ".join(sorted(_COMMANDS))
    return (
        "NAME:\n   ringfence-oci - Open Container Initiative runtime\n\n"
        "USAGE:\n   ringfence-oci [--root DIR] [--log FILE] [--log-format text|json] [--debug]\n"
        "                     [--systemd-cgroup] [--engine container|vm|kvm|bt]\n"
        "                     COMMAND [OPTIONS] [ID]\n\n"
        f"commands: {commands}\n"
    )


def _report(options: Arguments, command: str, message: str) -> None:
    """Writes an error where the engine looks for it, and to standard error."""
    from ringfence.container import lean_json

    line = {"level": "error", "msg": f"{message}", "time": now()}
    if options.text("log-format", "text") == "json":
        text = lean_json.dumps(line)
    else:
        quoted = lean_json.dumps(message)
        text = f"time={lean_json.dumps(line['time'])} level=error msg={quoted}"
    path = options.text("log")
    if path:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            sys.stderr.write(f"cannot write the log {path}: {error.strerror}\n")
        sys.stderr.write(f"ringfence-oci {command} failed: {message}\n")
        return
    sys.stderr.write(text + "\n")
