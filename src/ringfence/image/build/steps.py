"""The instructions that make layers: RUN, COPY, ADD and WORKDIR."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from ringfence.errors import CommandError, ConfigError
from ringfence.image.build import adding
from ringfence.image.build.configure import workdir_of
from ringfence.image.build.copying import (
    Placing,
    Source,
    digest_of,
    gather,
    gather_texts,
    write_copied,
)
from ringfence.image.build.ignore import Ignore
from ringfence.image.build.mounts import (
    MountRequest,
    cache_directory,
    mount_requests,
    secret_file,
)
from ringfence.image.build.runner import RunMount, Runner, RunStep
from ringfence.image.build.running import SCRIPT, Hidden, command_of, inside, place
from ringfence.image.build.stages import PREDEFINED
from ringfence.image.build.view import View
from ringfence.image.build.words import expand, split_words
from ringfence.image.build.workspace import open_workspace
from ringfence.image.layers import LayerWriter, MadeLayer
from ringfence.image.merged import Node, merge
from ringfence.image.rootfs import RootTree, tree_of
from ringfence.image.tarformat import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ringfence.image.build.builder import BuildOptions
    from ringfence.image.build.copying import Copied
    from ringfence.image.build.dockerfile import Instruction
    from ringfence.image.build.state import StageState, StepCache
    from ringfence.image.store import Store

__all__ = ["Steps"]


class Steps:
    """Makes the layers of a build's stages."""

    def __init__(  # noqa: PLR0913 - each is one thing that a step may need
        self,
        *,
        store: Store,
        context: Path,
        ignore: Ignore,
        runner: Runner,
        cache: StepCache,
        other: Callable[[str, int], StageState],
        created: str,
        latest_ns: int | None,
        options: BuildOptions,
    ) -> None:
        self._store = store
        self._context = context
        self._ignore = ignore
        self._runner = runner
        self._cache = cache
        self._other = other
        self._created = created
        self._latest_ns = latest_ns
        self._options = options
        self._source: Source | None = None

    def make(self, step: Instruction, state: StageState, stage: int) -> MadeLayer | None:
        """The layer of an instruction, made now or by an earlier build; None when it has none.

        Raises:
            ConfigError: The instruction is wrong.
            CommandError: Its command failed.
        """
        if step.name == "RUN":
            return self._run(step, state, stage)
        if step.name == "WORKDIR":
            return self._workdir(step, state)
        return self._copy(step, state, stage)

    @contextlib.contextmanager
    def _tree(self, state: StageState) -> Iterator[RootTree]:
        with tree_of(self._store, tuple(state.layers), state.config.diff_ids) as tree:
            yield tree

    def _cached(self, key: str, make: Callable[[], MadeLayer]) -> MadeLayer:
        layer = self._cache.get(key)
        if layer is not None:
            self._options.say("      as before")
            return layer
        layer = replace(make(), created=self._created)
        self._cache.put(key, layer)
        return layer

    # -- WORKDIR --------------------------------------------------------------------------------

    def _workdir(self, step: Instruction, state: StageState) -> MadeLayer | None:
        step.allow_flags()
        path = workdir_of(step, state)
        state.config = replace(state.config, workdir=path)
        with self._tree(state) as tree:
            view = View(merge(tree.layers))
            target, there = view.resolve(path)
            if there is not None:
                if there.children is None:
                    step.fail(f"{path} is a file")
                return None
            owner = view.owner(state.config.user) if state.config.user else (0, 0)

            def make() -> MadeLayer:
                with LayerWriter(self._store) as writer:
                    for count in range(1, len(target) + 1):
                        _directory(writer, view, target[:count], owner, self._latest_ns)
                    return writer.finish()

            return self._cached(state.key("WORKDIR", path, str(owner)), make)

    # -- COPY and ADD ---------------------------------------------------------------------------

    def _copy(self, step: Instruction, state: StageState, stage: int) -> MadeLayer:
        step.allow_flags(
            "from",
            "chown",
            "chmod",
            "link",
            "exclude",
            "checksum",
            "keep-git-dir",
            "unpack",
        )
        words = step.json_form()
        variables, escape = state.variables, step.escape
        if words is None:
            words = split_words(step.text, variables, escape)
        else:
            words = [expand(word, variables, escape) for word in words]
        words = [word for word in words if not word.startswith("<<")]
        if len(words) + len(step.heredocs) < 2:
            step.fail(f"{step.name} needs a source and a target")
        *patterns, target = words
        target = _absolute(target, state.config.workdir)
        with self._tree(state) as tree:
            view = View(merge(tree.layers))
            placing = self._placing(step, variables, view)
            with self._source_of(step, stage) as source:
                files, archives = self._gather(step, source, patterns, target, view, variables)
                key = state.key(
                    step.name,
                    digest_of(files),
                    digest_of(archives),
                    target,
                    str(placing),
                )

                def make() -> MadeLayer:
                    with LayerWriter(self._store) as writer:
                        write_copied(files, writer.tar, view, placing)
                        for item in archives:
                            adding.write_archive(
                                self._store,
                                item,
                                target,
                                writer.tar,
                                view,
                                placing,
                            )
                        return writer.finish()

                return self._cached(key, make)

    def _gather(
        self,
        step: Instruction,
        source: Source,
        patterns: list[str],
        target: str,
        view: View,
        variables: dict[str, str],
    ) -> tuple[list[Copied], list[Copied]]:
        """What is copied, and the archives that are unpacked."""
        texts: list[tuple[str, bytes]] = []
        for text in step.heredocs:
            body = _variables_only(text.text, variables) if text.expand else text.text
            texts.append((text.name, body.encode()))
        if step.name == "ADD":
            addresses = [p for p in patterns if adding.is_address(p)]
            patterns = [p for p in patterns if not adding.is_address(p)]
            texts += [adding.download(url, step.flag("checksum")) for url in addresses]
        files = gather(source, patterns, target, view) if patterns else []
        archives: list[Copied] = []
        if step.name == "ADD":
            files, archives = adding.split_archives(files)
        if texts:
            files += gather_texts(texts, target, view)
        return files, archives

    def _placing(self, step: Instruction, variables: dict[str, str], view: View) -> Placing:
        chown = expand(step.flag("chown"), variables, step.escape)
        chmod = expand(step.flag("chmod"), variables, step.escape)
        if chmod and not (chmod.isdigit() and set(chmod) <= set("01234567")):
            step.fail(f"--chmod takes a number in octal, not {chmod!r}")
        return Placing(
            owner=view.owner(chown) if chown else None,
            mode=int(chmod, 8) if chmod else None,
            latest_ns=self._latest_ns,
        )

    @contextlib.contextmanager
    def _source_of(self, step: Instruction, stage: int) -> Iterator[Source]:
        exclude = Ignore(step.all_flags("exclude"))
        name = step.flag("from")
        if name:
            with self._tree(self._other(name, stage)) as tree:
                yield Source(root=merge(tree.layers), ignore=exclude, owned=True)
            return
        if self._source is None:
            self._source = Source.directory(self._context, self._ignore)
        yield replace(self._source, ignore=_Both(self._ignore, exclude))

    # -- RUN ------------------------------------------------------------------------------------

    def _run(self, step: Instruction, state: StageState, stage: int) -> MadeLayer:
        step.allow_flags("mount", "network", "security")
        if step.flag("security", "sandbox") != "sandbox":
            step.fail("--security=insecure is not given to anything")
        argv, script = command_of(step, state)
        requests = mount_requests(step, state.config.workdir)
        network = step.flag("network", self._options.network)
        given = self._options.build_args
        env = {**{k: v for k, v in given.items() if k in PREDEFINED}, **state.variables}
        binds = [self._bind_key(request, stage) for request in requests]
        key = state.key(
            "RUN", *argv, script, "|", *(f"{k}={v}" for k, v in sorted(state.variables.items())),
            "|", state.config.workdir, state.config.user, network, *binds,
        )  # fmt: skip

        def make() -> MadeLayer:
            with contextlib.ExitStack() as stack:
                tree = stack.enter_context(self._tree(state))
                mounts = self._mounts(requests, stage, script, stack)
                space = stack.enter_context(open_workspace(self._store, tree.layers))
                view = View(merge(tree.layers))
                mounts = [place(space.root, mount, view) for mount in mounts]
                command = RunStep(
                    root=space.root,
                    argv=argv,
                    env=env,
                    workdir=state.config.workdir or "/",
                    user=state.config.user,
                    mounts=tuple(mounts),
                    network=network,
                    output=self._options.output,
                )
                code = self._runner.run(command)
                if code != 0:
                    msg = f"Dockerfile line {step.line}: RUN ended with status {code}: {step.text}"
                    raise CommandError(msg, exit_code=code)
                with LayerWriter(self._store) as writer:
                    hidden = Hidden(mounts, view)
                    space.pack(writer.tar, hidden, self._latest_ns)
                    return writer.finish()

        return self._cached(key, make)

    def _bind_key(self, request: MountRequest, stage: int) -> str:
        """What of a mount counts for the cache: files that are bound, not caches or secrets."""
        if request.kind != "bind":
            return f"{request.kind}:{request.target}:{request.id}"
        if request.origin:
            state = self._other(request.origin, stage)
            return f"bind:{request.target}:{request.source}:{state.key()}"
        source = Source.directory(self._context, self._ignore)
        view = View(Node("", os.lstat("/")))
        view.root.children = {}
        files = gather(source, [request.source], "/x/", view)
        return f"bind:{request.target}:{digest_of(files)}"

    def _mounts(
        self,
        requests: list[MountRequest],
        stage: int,
        script: str,
        stack: contextlib.ExitStack,
    ) -> list[RunMount]:
        found: list[RunMount] = []
        for request in requests:
            source = self._mount_source(request, stage, stack)
            if source is not None:
                found.append(
                    RunMount(source=source, target=request.target, read_only=request.read_only),
                )
        if script:
            folder = self._temporary(stack)
            path = folder / "script"
            path.write_text(script)
            path.chmod(0o755)
            found.append(RunMount(source=folder, target=SCRIPT, read_only=True))
        return found

    def _mount_source(
        self,
        request: MountRequest,
        stage: int,
        stack: contextlib.ExitStack,
    ) -> Path | None:
        if request.kind == "cache":
            return cache_directory(self._store.root, request)
        if request.kind == "tmpfs":
            return self._temporary(stack)
        if request.kind == "secret":
            return secret_file(request, self._options.secrets)
        if not request.origin:
            return inside(self._context, request.source)
        tree = stack.enter_context(self._tree(self._other(request.origin, stage)))
        node = View(merge(tree.layers)).resolve(request.source or "/")[1]
        if node is None:
            msg = f"there is no {request.source} in {request.origin} to mount"
            raise ConfigError(msg)
        if len(tree.layers) > 1:
            space = stack.enter_context(open_workspace(self._store, tree.layers))
            return inside(space.root, request.source)
        return inside(tree.layers[0], request.source)

    def _temporary(self, stack: contextlib.ExitStack) -> Path:
        path = self._store.blobs.temporary()
        path.mkdir()
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        return path


class _Both(Ignore):
    """Two sets of patterns."""

    def __init__(self, one: Ignore, two: Ignore) -> None:
        super().__init__()
        self._both = (one, two)
        self.has_exceptions = one.has_exceptions or two.has_exceptions

    def ignores(self, path: str) -> bool:
        return any(ignore.ignores(path) for ignore in self._both)


def _directory(
    writer: LayerWriter,
    view: View,
    path: tuple[bytes, ...],
    owner: tuple[int, int],
    latest_ns: int | None,
) -> None:
    there = view.resolve(os.fsdecode(b"/" + b"/".join(path)))[1]
    entry = Entry(b"/".join(path), Kind.DIRECTORY)
    entry.mode, entry.mtime_ns = 0o755, latest_ns or 0
    entry.uid, entry.gid = owner
    if there is not None:
        entry.mode, entry.mtime_ns = there.mode & 0o7777, there.mtime_ns
        entry.uid, entry.gid = there.uid, there.gid
    writer.tar.add(entry)


def _absolute(target: str, workdir: str) -> str:
    return target if target.startswith("/") else f"{(workdir or '/').rstrip('/')}/{target}"


def _variables_only(text: str, variables: dict[str, str]) -> str:
    """A heredoc's text with its variables replaced; its quotes stay."""
    quoted = text.replace("\\$", "\0").replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
    return expand(quoted, variables).replace("\0", "$")
