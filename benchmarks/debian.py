"""A Debian root with the whole programs to run: a directory for the host, an image of it for guests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.programs import CACHE

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.results import Log

RELEASE = "bookworm"
PACKAGES = (
    "python3-minimal",
    "libpython3-stdlib",
    "gcc",
    "libc6-dev",
    "xz-utils",
    "sqlite3",
    "openssl",
)
IMAGE_MIB = 1536
# As Debian's package python3 does, so that no run is spent compiling.
COMPILE = ("python3", "-m", "compileall", "-q", "/usr/lib/python3.11")

# At most so many times native, at least so many times faster than QEMU's translator.
TARGETS: dict[str, tuple[float | None, float | None]] = {
    "python-import": (2.5, 4.0),
    "python-loop": (2.5, 4.0),
    "gcc": (2.5, 4.0),
    "sqlite": (2.5, 4.0),
    "openssl-sha256": (2.5, 4.0),
    "openssl-aes-128-gcm": (2.5, 25.0),
    "xz": (2.0, 1.8),
    "shell-forks": (None, 4.0),
}

SCRIPTS = {
    "functions.py": """\
with open("/bench/functions.c", "w") as out:
    for n in range(700):
        out.write(f"int f{n}(int *a, int n) {{ int s = {n}; for (int i = 0; i < n; i++) "
                  f"{{ if (a[i] % {n + 2} == 0) s += a[i] * {n}; else s ^= a[i] >> {n % 13}; }} return s; }}\\n")
import random
random.seed(1)
words = [bytes(random.choices(b"etaoin shrdlu\\n", k=random.randint(2, 9))) for _ in range(5000)]
with open("/bench/text", "wb") as out:
    out.write(b" ".join(random.choices(words, k=2_000_000))[: 12 << 20])
""",
    "loop.py": """\
total = 0
for i in range(2_000_000):
    total = (total + i * i) & 0xFFFFFF
print(total)
""",
    "table.sql": """\
create table t(a integer, b text, c real);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 200000)
  insert into t select i, 'row ' || (i * 7919 % 200000), i * 0.5 from n;
create index by_b on t(b);
select count(*), sum(c) from t where b > 'row 5';
""",
    # openssl works for a fixed time: what it did is said as the time for 256 MiB.
    "speed.sh": """\
openssl speed -elapsed -seconds 1 -bytes 16384 -evp $1 -mr 2> /dev/null |
  awk -F: -v name=openssl-$1 '/^.F:/ { printf "@ %s %d 0\\n", name, 268435456e9 / $4 }'
""",
    "forks.sh": """\
i=0
while [ $i -lt 200 ]; do /bin/true; i=$((i + 1)); done
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """Where the root is.

    Args:
        folder: The files.
        image: A raw image with an ext4 file system of the same files.
    """

    folder: Path
    image: Path


def commands() -> list[str]:
    """What is run: each for at least some tenths of a second on the host."""
    quiet = "> /dev/null 2>&1"
    # The host's files are in memory by then, and the disk isn't what is measured.
    files = "/usr/bin/python3 /lib/x86_64-linux-gnu/*.so* /usr/bin/sqlite3 /usr/bin/xz /bin/sh"
    lines = {
        "warm": f"cat {files} > /dev/null; find /usr/lib/python3* -type f -exec cat {{}} + > /dev/null",
        "python-import": "python3 -c 'import json, asyncio, decimal'",
        "python-loop": f"python3 /bench/loop.py {quiet}",
        "gcc": "gcc -O2 -c -o /tmp/functions.o /bench/functions.c",
        "sqlite": f"sqlite3 :memory: < /bench/table.sql {quiet}",
        "xz": "xz -6 -T1 -c /bench/text > /dev/null",
        "shell-forks": "/bin/sh /bench/forks.sh",
    }
    timed = [f"{name}\t/bin/sh\t-c\t{line}" for name, line in lines.items()]
    return timed + [f"-\t/bin/sh\t/bench/speed.sh\t{name}" for name in ("sha256", "aes-128-gcm")]


def build(log: Log) -> Root:
    """Makes the root once and keeps it.

    Raises:
        PermissionError: This isn't root.
    """
    contents = hashlib.sha256(repr((RELEASE, PACKAGES, SCRIPTS, COMPILE)).encode()).hexdigest()[:12]
    root = Root(folder=CACHE / f"debian-{contents}", image=CACHE / f"debian-{contents}.img")
    if root.image.exists():
        return root
    if os.geteuid() != 0:
        message = (
            "building the Debian root needs root: run `sudo make bench` once, or leave --whole away"
        )
        raise PermissionError(message)
    log("building the Debian root\n")
    shutil.rmtree(root.folder, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    include = f"--include={','.join(PACKAGES)}"
    subprocess.run(
        ["debootstrap", "--variant=minbase", include, RELEASE, root.folder], check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    bench = root.folder / "bench"
    bench.mkdir()
    for name, text in SCRIPTS.items():
        (bench / name).write_text(text)
    subprocess.run(["chroot", root.folder, "python3", "/bench/functions.py"], check=True)
    subprocess.run(["chroot", root.folder, *COMPILE], check=True)
    temporary = root.image.with_suffix(".new")
    with temporary.open("wb") as file:
        file.truncate(IMAGE_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", root.folder, temporary], check=True)
    temporary.rename(root.image)
    return root
