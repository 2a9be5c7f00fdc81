"""The guest's first file system: the agent and the modules that it may need.

It holds nothing of a single machine, so one is kept for each (kernel, agent). The file ``modules`` in
it has a line for each module, dependencies before those that need them: its name, its file, and the
names that it needs. What isn't listed is built into the kernel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
import os
import re
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence import _paths
from ringfence.errors import ConfigError, FormatError, HostError
from ringfence.guest.newc import Entry, archive

if TYPE_CHECKING:
    from ringfence.guest.kernels import Kernel

__all__ = ["MODULES", "Module", "build", "resolve_modules"]

# What an agent may load, by name; the modules these need are found in them.
MODULES = (
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "overlay",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "ext4",
    "erofs",
    "squashfs",
    "isofs",
    "af_packet",
    "ipv6",
    "pvpanic_mmio",
)
_FORMAT = "2"
_SIGNATURE = b"~Module signature appended~\n"
# Before that word: its descriptor, whose last field is the signature's length.
_SIGNATURE_DESCRIPTOR_BYTES = 12
_MAX_MODULE_BYTES = 64 << 20
# Archives in the cache: one is made for each kernel and agent.
_KEPT = 8
_SUFFIXES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module as it goes into the initramfs.

    Args:
        name: With underscores.
        data: The ELF file.
        needs: Names of modules that must be loaded before it.
    """

    name: str
    data: bytes
    needs: tuple[str, ...]


def build(kernel: Kernel, agent: Path, further: tuple[str, ...] = ()) -> Path:
    """The initramfs for a kernel and an agent, made once and kept in the cache.

    Args:
        kernel: Whose modules it carries.
        agent: The static program ``ringfence-agent``.
        further: Modules that only some machines need.

    Raises:
        ConfigError: The agent can't be read or is no static program for this processor.
        FormatError: A module of the kernel is broken.
        HostError: The cache can't be written.
    """
    program = _read_agent(agent)
    folder = _paths.cache_dir() / "initramfs"
    wanted = MODULES + further
    path = folder / f"{kernel.version}-{_key(kernel, program, wanted)}.cpio"
    if path.is_file():
        return path
    modules = resolve_modules(kernel.modules, wanted)
    if not _needs_signatures(kernel):
        modules = [dataclasses.replace(one, data=unsigned(one.data)) for one in modules]
    data = archive(_entries(program, modules))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".new-", delete=False) as file:
            file.write(data)
        # Nobody may see half a file.
        Path(file.name).rename(path)
        _prune(folder)
    except OSError as error:
        message = f"cannot write the initramfs to {folder}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(path)) from error
    return path


def _prune(folder: Path) -> None:
    """Removes all but the newest few; whoever has one open keeps it."""
    kept = sorted(folder.glob("*.cpio"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in kept[_KEPT:]:
        old.unlink(missing_ok=True)


def _read_agent(agent: Path) -> bytes:
    try:
        program = agent.read_bytes()
    except OSError as error:
        message = f"cannot read the agent {agent}: {error.strerror}"
        raise ConfigError(message, hint="make build") from error
    # e_machine 62: x86-64. An interpreter's name means that it needs libraries.
    if program[:4] != b"\x7fELF" or program[18:20] != b"\x3e\0" or b"/ld-linux" in program[:4096]:
        message = f"{agent} is no static x86-64 program, so it can't run in a guest"
        raise ConfigError(message, hint="make build")
    return program


def _key(kernel: Kernel, program: bytes, wanted: tuple[str, ...]) -> str:
    """Changes when the archive would."""
    status = kernel.image.stat()
    words = (_FORMAT, kernel.version, kernel.modules, status.st_size, status.st_mtime_ns, wanted)
    digest = hashlib.sha256("\n".join(str(word) for word in words).encode())
    digest.update(program)
    return digest.hexdigest()[:16]


def _entries(program: bytes, modules: list[Module]) -> list[Entry]:
    lines = [" ".join((module.name, f"{module.name}.ko", *module.needs)) for module in modules]
    return [
        *(Entry.directory(name) for name in ("dev", "proc", "sys", "root", "run", "ringfence")),
        # Before the agent mounts /dev, the kernel opens the console and programs expect null.
        Entry.device("dev/console", 0o600, 5, 1),
        Entry.device("dev/null", 0o666, 1, 3),
        Entry.file("init", program, 0o755),
        Entry.file("ringfence/modules", "".join(f"{line}\n" for line in lines).encode()),
        *(Entry.file(f"ringfence/{module.name}.ko", module.data) for module in modules),
    ]


def resolve_modules(root: Path, wanted: tuple[str, ...]) -> list[Module]:
    """The modules for ``wanted`` and all that they need, each behind what it needs.

    Args:
        root: A ``lib/modules/VERSION`` directory. Names that aren't there are built in.
        wanted: Module names, with ``-`` or ``_``.

    Raises:
        FormatError: A module is corrupt, compressed in an unknown way, or needs itself.

    Source:
        ``depends`` and ``softdep`` of a module's ``.modinfo`` section, as modinfo(8) shows them.
    """
    files = _module_files(root)
    order: list[Module] = []
    done: set[str] = set()
    pending: set[str] = set()

    def add(name: str) -> bool:
        name = name.replace("-", "_")
        if name in done:
            return True
        if name not in files:
            return False
        if name in pending:
            message = f"module {name} of {root} needs itself"
            raise FormatError(message)
        pending.add(name)
        data = _read_module(files[name])
        needs = tuple(needed.replace("-", "_") for needed in _needs(data) if add(needed))
        done.add(name)
        order.append(Module(name=name, data=data, needs=needs))
        return True

    for name in wanted:
        add(name)
    return order


def _needs_signatures(kernel: Kernel) -> bool:
    """Whether the kernel refuses modules without; so is taken what doesn't say."""
    for name in (f"config-{kernel.version}", "config"):
        path = kernel.image.parent / name
        if path.is_file():
            return "CONFIG_MODULE_SIG_FORCE=y" in path.read_text(errors="replace").splitlines()
    return True


def unsigned(data: bytes) -> bytes:
    """A module without its signature.

    The package manager has verified it, and it reaches the guest as the kernel does: checking each
    again in the guest only takes time, a third of that for loading it.

    Source: Linux ``include/linux/module_signature.h``.
    """
    if not data.endswith(_SIGNATURE):
        return data
    end = len(data) - len(_SIGNATURE)
    length = int.from_bytes(data[end - 4 : end], "big")
    return data[: max(0, end - _SIGNATURE_DESCRIPTOR_BYTES - length)]


def _module_files(root: Path) -> dict[str, Path]:
    files = {}
    for folder, _, names in os.walk(root / "kernel"):
        for name in names:
            stem, dot, suffix = name.partition(".")
            if dot + suffix in _SUFFIXES:
                files[stem.replace("-", "_")] = Path(folder) / name
    return files


def _needs(data: bytes) -> list[str]:
    needs: list[str] = []
    for key, value in re.findall(rb"\0(depends|softdep)=([^\0]*)", data):
        text = value.decode(errors="replace")
        if key == b"depends":
            needs += [name for name in text.split(",") if name]
        elif text.startswith("pre:"):
            needs += text.removeprefix("pre:").split("post:")[0].split()
    return needs


def _read_module(path: Path) -> bytes:
    """A module's file, decompressed as its name says."""
    try:
        data = _decompressed(path.suffix, path.read_bytes())
    except (OSError, lzma.LZMAError, zlib.error, ValueError) as error:
        message = f"cannot read the module {path}: {error}"
        raise FormatError(message) from error
    if data[:4] != b"\x7fELF":
        message = f"{path} is no module: it is no ELF file"
        raise FormatError(message)
    return data


def _decompressed(suffix: str, data: bytes) -> bytes:
    match suffix:
        case ".gz":
            decoder = zlib.decompressobj(wbits=31)
            return decoder.decompress(data, _MAX_MODULE_BYTES)
        case ".xz":
            return lzma.LZMADecompressor().decompress(data, _MAX_MODULE_BYTES)
        case ".zst":
            # Few distributions need it, and it isn't in the standard library.
            import zstandard  # noqa: PLC0415

            try:
                with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                    return reader.read(_MAX_MODULE_BYTES)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
        case _:
            return data
