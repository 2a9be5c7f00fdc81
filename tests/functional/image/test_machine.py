"""One image on each engine: the same script says the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ringfence.image import Store
from ringfence.image.build import BuildOptions, build
from ringfence.machine.image_runner import MachineRunner
from ringfence.machine.machine import Machine
from tests.framework.debian_image import debian_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.machine.spec import EngineName

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("session_state")]

SCRIPT = r"""
echo "env $A|$B|$PATH"
echo "user $(id -u):$(id -g) $(id -un) of $(id -G)"
echo "in $(pwd)"
while read -r _ place kind _; do
    case $place in /|/proc|/data) echo "mount $place $kind" | sed s/virtiofs/shared/\;s/ext[234]/shared/ ;; esac
done < /proc/mounts | sort -u | grep -v rootfs
echo "data $(cat /data/file)"
echo "owners $(stat -c %U:%G:%a /etc/shadow /usr/bin/passwd /tmp | tr '\n' ' ')"
echo "shadow $(cat /etc/shadow 2>&1 | grep -c denied)"
sh -c 'exit 41'; echo "exit $?"
sh -c 'kill -9 $$' 2>/dev/null; echo "killed $?"
/etc/passwd 2>/dev/null; echo "not a program $?"
/none 2>/dev/null; echo "nothing $?"
"""

EXPECTED = """\
env of the image|given|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
user 33:33 www-data of 33
in /srv/work
mount / overlay
mount /data shared
mount /proc proc
data shared
owners root:shadow:640 root:root:4755 root:root:1777 
shadow 1
exit 41
killed 137
not a program 126
nothing 127
"""  # noqa: W291 - so it is printed

DOCKERFILE = """\
FROM debian:12
ENV A="of the image" B=too
WORKDIR /srv/work
RUN mkdir /made && chown www-data /made && echo kept > /tmp/kept && rm /etc/issue
RUN test "$(cat /tmp/kept)" = kept && test "$(stat -c %U /made)" = www-data && test ! -e /etc/issue
USER www-data
CMD ["sh", "-c", "pwd; id -un"]
"""


@pytest.fixture(scope="module")
def built(
    engine: EngineName,
    session_state: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """An image made here from Debian's packages, by commands that ran on the engine."""
    assert session_state.exists()
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        store = Store()
        debian_image(store)
        context = folder / "context"
        context.mkdir()
        build(store, context, DOCKERFILE, MachineRunner(engine), BuildOptions(tags=("built",)))
        yield "built"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("shared\n")
    tmp_path.chmod(0o755)
    return tmp_path


def output_of(engine: EngineName, built: str, data: Path) -> str:
    mount = f"{data}:/data:ro"
    with Machine(engine=engine, image=built, env={"B": "given"}, mounts=[mount]) as machine:
        result = machine.run(["sh", "-c", SCRIPT])
    assert result.stderr == ""
    return result.stdout


def test_the_same_script_says_the_same(engine: EngineName, built: str, data: Path) -> None:
    assert output_of(engine, built, data) == EXPECTED


def test_in_a_container_too(built: str, data: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("owners are kept where root unpacked the image")
    assert output_of("container", built, data) == EXPECTED
