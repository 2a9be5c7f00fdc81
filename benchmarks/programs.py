"""The guests' programs and their first file systems, built when their sources change."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ringfence.guest import kernels
from ringfence.guest.initramfs import resolve_modules
from ringfence.guest.newc import Entry, archive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ringfence.guest.kernels import Kernel

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = REPOSITORY / "benchmarks" / "guest"
CACHE = REPOSITORY / ".cache" / "benchmarks"

_NO_FILES: Mapping[str, Path] = MappingProxyType({})

MICRO = (
    *("sieve", "calls", "quicksort", "chase", "doubles", "matrix", "copy"),
    *("syscalls", "forks", "faults", "pipes"),
)


def build() -> dict[str, Path]:
    """Every program of ``guest/``, compiled statically, by name."""
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in [*sources, SOURCES / "bench.h"]))
    folder = CACHE / f"programs-{digest.hexdigest()[:12]}"
    built = {path.stem: folder / path.stem for path in sources}
    if not all(path.exists() for path in built.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for path in sources:
            command = [
                "cc",
                "-O2",
                "-static",
                "-o",
                str(built[path.stem]),
                str(path),
                "-lm",
                "-pthread",
            ]
            subprocess.run(command, check=True)
    return built


def kernel() -> Kernel:
    """The stock kernel that every guest boots."""
    return kernels.find()


def initramfs(
    name: str,
    commands: Sequence[str],
    modules: tuple[str, ...] = (),
    files: Mapping[str, Path] = _NO_FILES,
    *,
    disk_is_root: bool = False,
) -> Path:
    """A first file system with every program in ``/bench``.

    Args:
        name: Of the file.
        commands: What ``init`` runs: lines of words separated by tabs.
        modules: Names of kernel modules to load, with what these need.
        files: Further files of the host, by their paths in it without the first slash.
        disk_is_root: The commands run in the ext4 file system on ``/dev/vda``.
    """
    programs = build()
    order = resolve_modules(kernel().modules, modules)
    folders = {str(up) for path in files for up in Path(path).parents} - {"."}
    entries = [
        *(Entry.directory(path) for path in sorted(folders)),
        *(Entry.file(path, source.read_bytes(), 0o755) for path, source in files.items()),
        *(
            Entry.directory(path)
            for path in ("dev", "proc", "sys", "tmp", "root", "bench", "modules")
        ),
        Entry.device("dev/console", 0o600, 5, 1),
        Entry.device("dev/null", 0o666, 1, 3),
        Entry.file("init", programs["init"].read_bytes(), 0o755),
        Entry.file("commands", "".join(f"{line}\n" for line in commands).encode()),
        Entry.file("modules/order", "".join(f"{module.name}\n" for module in order).encode()),
        *(Entry.file(f"modules/{module.name}", module.data) for module in order),
        *([Entry.file("disk-is-root", b"")] if disk_is_root else []),
        *(Entry.file(f"bench/{key}", path.read_bytes(), 0o755) for key, path in programs.items()),
    ]
    path = CACHE / f"{name}.cpio"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive(entries))
    return path
