"""Whole builds, with commands run in a chroot; the base image is busybox alone."""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import CommandError, ConfigError, NotFoundError
from ringfence.image import Store
from ringfence.image.build import BuildOptions, build, builder
from ringfence.image.build.view import View
from ringfence.image.build.workspace import open_workspace
from ringfence.image.create import from_directory
from ringfence.image.merged import merge
from tests.framework.chroot_runner import ChrootRunner

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.image import Image

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root"),
    pytest.mark.skipif(
        shutil.which("busybox") is None,
        reason="busybox is not installed (apt install busybox)",
    ),
]


@pytest.fixture
def base(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    root = tmp_path / "base"
    for name in ("bin", "etc", "proc", "tmp", "usr/lib"):
        (root / name).mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nwww:x:33:34::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nweb:x:35:\n")
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, root / "bin/busybox")
    for name in ("sh", "cat", "echo", "ls", "rm", "mkdir", "touch", "id", "env", "ln", "chmod",
                 "printf", "cp", "test", "wc", "mv", "chown", "sed", "pwd"):  # fmt: skip
        (root / "bin" / name).symlink_to("busybox")
    for path in [*root.rglob("*"), root]:
        os.utime(path, (1600000000, 1600000000), follow_symlinks=False)
    return from_directory(store, root, "base")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    (path / "src").mkdir(parents=True)
    (path / "src" / "a.txt").write_text("a")
    (path / "src" / "b.txt").write_text("b")
    (path / "src" / "x.log").write_text("log")
    (path / "src" / "link").symlink_to("a.txt")
    (path / "run.sh").write_text("#!/bin/sh\n")
    (path / "run.sh").chmod(0o755)
    (path / ".dockerignore").write_text("**/*.log\n.dockerignore\n")
    return path


class Builds:
    """Builds, and looks into what came of it."""

    def __init__(self, store: Store, context: Path) -> None:
        self.store = store
        self.context = context
        self.runner = ChrootRunner()
        self.said: list[str] = []
        self.written = b""

    def __call__(self, text: str, **options: object) -> Image:
        self.said.clear()
        chosen = BuildOptions(
            say=self.said.append,
            output=self._write,
            **options,  # type: ignore[arg-type]
        )
        return build(self.store, self.context, text, self.runner, chosen)

    def _write(self, data: bytes) -> None:
        self.written += data

    def text(self, image: Image, path: str) -> str:
        with self.store.rootfs(image) as tree:
            return View(merge(tree.layers)).text(path)

    def names(self, image: Image, path: str) -> list[str]:
        with self.store.rootfs(image) as tree:
            node = View(merge(tree.layers)).resolve(path)[1]
            return sorted(os.fsdecode(name) for name in (node.children or {})) if node else []

    def owner(self, image: Image, path: str) -> tuple[int, int, str]:
        with self.store.rootfs(image) as tree:
            node = View(merge(tree.layers)).resolve(path)[1]
            assert node is not None
            return node.uid, node.gid, oct(stat.S_IMODE(node.mode))


@pytest.fixture
def builds(store: Store, context: Path, base: Image) -> Builds:  # noqa: ARG001 - it is FROM's
    return Builds(store, context)


def test_run_makes_layers_and_removes(builds: Builds) -> None:
    image = builds(
        "FROM base\n"
        "RUN echo one > /one && mkdir /d && touch /d/x && touch /tmp/kept\n"
        "RUN rm /one /d/x && echo two > /d/y\n",
    )
    assert builds.names(image, "/d") == ["y"]
    assert "one" not in builds.names(image, "/")
    assert builds.names(image, "/tmp") == ["kept"]
    assert len(image.manifest.layers) == 3


def test_copy_from_context(builds: Builds) -> None:
    image = builds(
        "FROM base\n"
        "WORKDIR /srv/app\n"
        "COPY src ./\n"
        "COPY run.sh /usr/bin/\n"
        "COPY --chown=www:web --chmod=640 src/a.txt /renamed\n"
        "COPY src/?.txt /globbed/\n"
        "COPY run.sh /lib/through-link\n",
    )
    assert builds.names(image, "/srv/app") == ["a.txt", "b.txt", "link"]
    assert builds.owner(image, "/usr/bin/run.sh") == (0, 0, "0o755")
    assert builds.owner(image, "/renamed") == (33, 35, "0o640")
    assert builds.names(image, "/globbed") == ["a.txt", "b.txt"]
    # /lib stays the link that it is.
    assert "through-link" in builds.names(image, "/usr/lib")
    assert image.config.workdir == "/srv/app"


def test_stages(builds: Builds) -> None:
    text = (
        "ARG FROM_ARG=base\n"
        "FROM ${FROM_ARG} AS one\n"
        "RUN echo made > /made && chown 33:34 /made\n"
        "FROM base AS unused\n"
        "RUN exit 1\n"
        "FROM one AS two\n"
        "RUN echo more > /more\n"
        "FROM scratch\n"
        "COPY --from=two /made /more /out/\n"
        "COPY --from=base /etc/passwd /\n"
    )
    image = builds(text)
    assert builds.names(image, "/") == ["out", "passwd"]
    assert builds.owner(image, "/out/made")[:2] == (33, 34)
    assert builds.names(builds(text, target="one"), "/out") == []
    with pytest.raises(NotFoundError, match="no stage 'three'"):
        builds(text, target="three")


def test_variables(builds: Builds) -> None:
    image = builds(
        "ARG GLOBAL=g\n"
        "FROM base\n"
        "ARG GLOBAL\n"
        "ARG NAME=default\n"
        "ARG HIDDEN=arg\n"
        "ENV HIDDEN=env PLAIN=$NAME-${GLOBAL}\n"
        "RUN echo $HIDDEN $NAME $PLAIN $GLOBAL > /out\n"
        'LABEL "with blank"="$NAME" b=c\n',
        build_args={"NAME": "given"},
    )
    assert builds.text(image, "/out") == "env given given-g g\n"
    assert "PLAIN=given-g" in image.config.env
    assert not [text for text in image.config.env if text.startswith("NAME=")]
    assert image.config.labels == {"with blank": "given", "b": "c"}


def test_heredocs(builds: Builds) -> None:
    image = builds(
        "FROM base\n"
        "ENV A=x\n"
        "RUN <<EOF\n"
        "set -e\n"
        "echo $A > /script\n"
        "EOF\n"
        "RUN cat <<ONE > /one && cat <<TWO > /two\n"
        "first $A\n"
        "ONE\n"
        "second\n"
        "TWO\n"
        "RUN <<EOF\n"
        "#!/bin/cat\n"
        "EOF\n"
        "COPY <<PLAIN <<'RAW' /files/\n"
        'say "$A"\n'
        "PLAIN\n"
        'say "$A"\n'
        "RAW\n",
    )
    assert builds.text(image, "/script") == "x\n"
    assert builds.text(image, "/one") == "first x\n"
    assert builds.text(image, "/two") == "second\n"
    assert b"#!/bin/cat" in builds.written
    assert builds.text(image, "/files/PLAIN") == 'say "x"\n'
    assert builds.text(image, "/files/RAW") == 'say "$A"\n'
    assert "ringfence-build" not in builds.names(image, "/run")


def test_cache_is_by_content(builds: Builds, context: Path) -> None:
    text = "FROM base\nCOPY src /src\nRUN echo x > /x\n"
    first = builds(text)
    assert builds(text).digest == first.digest
    assert len(builds.runner.steps) == 1
    os.utime(context / "src" / "a.txt", (1, 1))
    assert builds(text).digest == first.digest
    (context / "src" / "x.log").write_text("ignored")
    builds(text)
    assert len(builds.runner.steps) == 1
    (context / "src" / "a.txt").write_text("changed")
    assert builds(text).digest != first.digest
    assert len(builds.runner.steps) == 2
    builds(text, cache=False)
    assert len(builds.runner.steps) == 3


def test_fixed_time_makes_equal_images(builds: Builds, tmp_path: Path, base: Image) -> None:
    text = "FROM base\nCOPY . /src\nWORKDIR /new/dir\nRUN echo x > /x && mkdir /y\n"
    one = builds(text, cache=False)
    other = Builds(Store(tmp_path / "other"), builds.context)
    with_base = builds.store.rootfs(base)
    from_directory(other.store, with_base.layers[0], "base")
    with_base.close()
    two = other(text, cache=False)
    assert one.config == two.config
    assert one.digest == two.digest


def test_mounts(builds: Builds, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    text = (
        "FROM base AS other\n"
        "RUN echo other > /file\n"
        "FROM base\n"
        "RUN --mount=type=cache,target=/cache echo x >> /cache/n && cp /cache/n /n\n"
        "RUN --mount=type=bind,source=src,target=/bound cp /bound/a.txt /copied\n"
        "RUN --mount=from=other,target=/stage,source=/ cp /stage/file /from-stage\n"
        'RUN --mount=type=secret,id=key test "$(cat /run/secrets/key)" = s3cret\n'
    )
    image = builds(text, secrets={"key": secret})
    assert builds.text(image, "/copied") == "a"
    assert builds.text(image, "/from-stage") == "other\n"
    assert not {"cache", "bound", "stage", "run"} & set(builds.names(image, "/"))
    image = builds(text, secrets={"key": secret}, cache=False)
    assert builds.text(image, "/n") == "x\nx\n"
    needs = "FROM base\nRUN --mount=type=secret,id=no,required echo\n"
    with pytest.raises(ConfigError, match="the secret 'no' is required"):
        builds(needs)


def test_configuration(builds: Builds) -> None:
    image = builds(
        "FROM base\n"
        'SHELL ["/bin/sh", "-ec"]\n'
        "USER www\n"
        "RUN id -u > /tmp/who\n"
        "EXPOSE 80 53/udp 8000-8001\n"
        'VOLUME ["/data", "/more"]\n'
        "STOPSIGNAL SIGINT\n"
        'HEALTHCHECK --interval=1m30s --retries=3 CMD ["true"]\n'
        'ENTRYPOINT ["/bin/sh"]\n'
        "CMD echo hello\n"
        "MAINTAINER somebody\n",
    )
    config = image.config
    assert builds.text(image, "/tmp/who") == "33\n"
    assert config.exposed_ports == ("53/udp", "80/tcp", "8000/tcp", "8001/tcp")
    assert config.volumes == ("/data", "/more")
    assert (config.stop_signal, config.user, config.author) == ("SIGINT", "www", "somebody")
    assert config.healthcheck == {
        "Test": ["CMD", "true"], "Interval": 90_000_000_000, "Retries": 3,
    }  # fmt: skip
    assert config.entrypoint == ("/bin/sh",)
    assert config.cmd == ("/bin/sh", "-ec", "echo hello")


def test_on_build(builds: Builds) -> None:
    builds("FROM base\nONBUILD COPY src /src\nONBUILD RUN echo on > /on\n", tags=("parent",))
    image = builds("FROM parent\nRUN cat /on > /seen\n")
    assert builds.text(image, "/seen") == "on\n"
    assert builds.names(image, "/src") == ["a.txt", "b.txt", "link"]
    assert image.config.on_build == ()


def test_add_unpacks_archives(builds: Builds, context: Path) -> None:
    shutil.make_archive(str(context / "pack"), "gztar", context / "src")
    image = builds("FROM base\nADD pack.tar.gz run.sh /add/\nCOPY pack.tar.gz /copy/\n")
    assert {"a.txt", "b.txt", "run.sh"} <= set(builds.names(image, "/add"))
    assert builds.names(image, "/copy") == ["pack.tar.gz"]


def test_failures_name_the_line(builds: Builds) -> None:
    with pytest.raises(CommandError, match="line 3: RUN ended with status 7") as caught:
        builds("FROM base\n\nRUN exit 7\n")
    assert caught.value.exit_code == 7
    for text, why in (
        ("FROM base\nCOPY none /x\n", "line 2: COPY: there is no 'none'"),
        ("FROM base\nCOPY src/x.log /x\n", "there is no 'src/x.log'"),
        ("FROM base\nCOPY ../../etc/passwd /x\n", "there is no"),
        ("FROM base\nCOPY src/a.txt src/b.txt /x\n", "isn't a directory"),
        ("FROM base\nCOPY --chown=nobody src /x\n", "no 'nobody' in /etc/passwd"),
        ("FROM base\nCOPY --sideways src /x\n", "no flag --sideways"),
        ("FROM base AS a\nFROM base AS A\n", "two stages 'a'"),
        ("RUN x\n", "before the first FROM"),
        ("FROM $NONE\n", "stands for no image"),
    ):
        with pytest.raises(ConfigError, match=why):
            builds(text)
    assert not list((builds.store.root / "tmp").iterdir())


def test_what_a_killed_build_left_mounted_is_cleared(builds: Builds) -> None:
    image = builds("FROM base\nRUN echo x > /x\n")
    tree = builds.store.rootfs(image)
    left = open_workspace(builds.store, tree.layers)
    (left.root / "written").write_text("y")
    assert left.root.is_mount()
    tree.close()
    builds.store.prune()
    assert not left.root.exists()
    assert not list((builds.store.root / "tmp").iterdir())
    with builds.store.rootfs(image) as tree:
        assert (tree.layers[-1] / "x").read_text() == "x\n"


def test_a_build_that_makes_nothing_anew_has_the_same_result(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "FROM base\nENV A=1\nCOPY src /src\nRUN echo made > /made\nCMD ['x']\n"
    times = iter(["2030-01-01T00:00:00Z", "2031-01-01T00:00:00Z", "2032-01-01T00:00:00Z"])
    monkeypatch.setattr(builder, "created_now", lambda: (next(times), None))

    first, second = builds(text), builds(text)
    (builds.context / "src/a.txt").write_text("changed")
    third = builds(text)

    assert second.digest == first.digest
    assert first.config.created == "2030-01-01T00:00:00Z"
    assert third.config.created == "2032-01-01T00:00:00Z"
