"""Builds the binaries of the trust boundary and puts them where the package looks for them.

``ringfence-vm`` and ``ringfence-gateway`` are ordinary programs of this host; ``ringfence-agent`` runs as PID 1 of guests that have
nothing else and ``ringfence-init`` in containers that may have nothing, so these are static: by the musl
target where rustup has it, by a static glibc otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DESTINATION = REPOSITORY / "src" / "ringfence" / "_bin"
MUSL = "x86_64-unknown-linux-musl"
GLIBC = "x86_64-unknown-linux-gnu"


def cargo(*arguments: str, env: dict[str, str] | None = None) -> bytes:
    """Runs cargo and returns what it wrote on standard output."""
    command = ["cargo", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, check=True)
    return done.stdout


def built(package: str, *arguments: str, env: dict[str, str] | None = None) -> Path:
    """Builds a package's program of the same name, and returns where it is."""
    common = ["build", "--locked", "--message-format=json-render-diagnostics"]
    output = cargo(*common, "-p", package, "--bin", package, *arguments, env=env)
    for line in output.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == package:
            return Path(message["executable"])
    error = f"cargo built no {package}"
    raise RuntimeError(error)


def has_musl() -> bool:
    """Whether Rust's standard library for musl is here; asks rustup for it otherwise."""
    query = ["rustc", "--print", "target-libdir", "--target", MUSL]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    if found.returncode == 0 and Path(found.stdout.strip()).is_dir():
        return True
    if shutil.which("rustup") is None:
        return False
    added = subprocess.run(["rustup", "target", "add", MUSL], check=False)
    return added.returncode == 0


def build_static(package: str) -> Path:
    """A program that needs no libraries."""
    if has_musl():
        return built(package, "--profile", "agent", "--target", MUSL)
    flags = f"{os.environ.get('RUSTFLAGS', '')} -C target-feature=+crt-static".strip()
    environment = {**os.environ, "RUSTFLAGS": flags}
    return built(package, "--profile", "agent", "--target", GLIBC, env=environment)


def put(program: Path) -> None:
    """Copies a program, without its debugging information, unless it is there already."""
    DESTINATION.mkdir(parents=True, exist_ok=True)
    target = DESTINATION / program.name
    if target.exists() and target.stat().st_mtime_ns >= program.stat().st_mtime_ns:
        return
    temporary = target.with_suffix(".new")
    shutil.copy(program, temporary)
    strip = shutil.which("strip")
    if strip:
        subprocess.run([strip, "--strip-debug", temporary], check=True)
    # A program that runs can be replaced, but not written.
    temporary.replace(target)


def main() -> int:
    """Builds all."""
    if shutil.which("cargo") is None:
        sys.stderr.write("cargo is missing: install Rust 1.88 or later (https://rustup.rs)\n")
        return 1
    try:
        put(built("ringfence-vm", "--release"))
        put(built("ringfence-gateway", "--release"))
        put(build_static("ringfence-agent"))
        put(build_static("ringfence-init"))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
