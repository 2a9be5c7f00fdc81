"""A mixed load whose results are known: run on the host and in a guest, it has to print the same.

python mixed_load.py ROUNDS

Each round works in threads at once: compile, compress, fork, signals, sorting, system calls. Only results are
printed, no times and no process numbers.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

FUNCTIONS = 60


def compile_functions(seed: int) -> str:
    """Compiles generated functions and runs them."""
    source = ["#include <stdio.h>"]
    source += [
        f"static long f{n}(long x) {{ for (int i = 0; i < {n + 3}; i++) "
        f"x = (x * {seed % 97 + n + 3} + {n}) % 1000003; return x; }}"
        for n in range(FUNCTIONS)
    ]
    calls = " + ".join(f"f{n}(x)" for n in range(FUNCTIONS))
    source.append(f'int main(void) {{ long x = {seed}; printf("%ld\\n", {calls}); return 0; }}')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "functions.c"
        path.write_text("\n".join(source))
        program = Path(folder) / "functions"
        subprocess.run(["gcc", "-O2", "-o", program, path], check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def compress(seed: int) -> str:
    """Compresses text in two ways, and gets it back."""
    words = random.Random(seed)
    text = b" ".join(b"%d" % words.randrange(5000) for _ in range(60_000))
    packed = lzma.compress(text, preset=3)
    assert lzma.decompress(packed) == text
    assert zlib.decompress(zlib.compress(text, 6)) == text
    return hashlib.sha256(packed).hexdigest()


def fork_storm(seed: int) -> str:
    """Many processes that end in different ways."""
    statuses = []
    for n in range(60):
        child = os.fork()
        if child == 0:
            if (seed + n) % 5 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit((seed + n) % 128)
        statuses.append(os.waitpid(child, 0)[1])
    return hashlib.sha256(repr(statuses).encode()).hexdigest()


def shell(seed: int) -> str:
    """A shell with pipes and many small programs."""
    script = f"for i in $(seq 1 40); do echo $((i * {seed} % 1009)); done | sort -n | uniq -c | sha256sum"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def compute(seed: int) -> str:
    """Integers and floats, long and short."""
    numbers = random.Random(seed)
    values = [numbers.random() for _ in range(20_000)]
    floats = math.fsum(math.sin(value) * math.sqrt(value) for value in sorted(values))
    return f"{floats:.12g} {pow(seed + 3, 4001, 2**521 - 1) % 10**12}"


def main() -> int:
    """Prints a line for each round."""
    caught: list[int] = []
    # Signals arrive all the time, in whatever runs.
    signal.signal(signal.SIGALRM, lambda number, _: caught.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    works = (compile_functions, compress, shell, compute, compress, compute)
    for number in range(int(sys.argv[1])):
        with ThreadPoolExecutor(len(works)) as pool:
            pending = [pool.submit(partial(work, number * 10 + n)) for n, work in enumerate(works)]
            results = [future.result() for future in pending]
        # Forking while threads run isn't for Python.
        results.append(fork_storm(number))
        sys.stdout.write(f"{number} {' '.join(results)}\n")
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert caught
    return 0


if __name__ == "__main__":
    sys.exit(main())
