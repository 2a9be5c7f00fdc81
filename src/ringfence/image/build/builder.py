"""Builds an image from a Dockerfile: stage by stage, only those that are needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, NotFoundError
from ringfence.image.build.configure import CONFIGURE
from ringfence.image.build.dockerfile import Instruction, parse_dockerfile
from ringfence.image.build.ignore import Ignore
from ringfence.image.build.stages import (
    PREDEFINED,
    Stage,
    arg_of,
    platform_variables,
    stages_of,
)
from ringfence.image.build.state import StageState, StepCache
from ringfence.image.build.steps import Steps
from ringfence.image.config import History, ImageConfig
from ringfence.image.create import DEFAULT_PATH, add_image, created_now
from ringfence.image.platforms import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ringfence.image.build.runner import Runner
    from ringfence.image.store import Image, Store

__all__ = ["BuildOptions", "build"]

# Of an image in which nothing was made.
_BEGINNING = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How an image is built.

    Args:
        tags: What to call it.
        target: The stage to build; the last by default.
        build_args: Values for ARG.
        platform: Of the base images.
        labels: Further labels.
        secrets: Files by the identity that ``RUN --mount=type=secret`` names.
        cache: Whether layers of earlier builds are used.
        pull: Fetch base images even when they are here.
        plain_http: Speak unencrypted HTTP to registries.
        network: Of RUN: ``default``, ``none`` or ``host``.
        say: Is told of each step.
        output: Is told what commands write.
    """

    tags: tuple[str, ...] = ()
    target: str = ""
    build_args: Mapping[str, str] = field(default_factory=dict)
    platform: Platform = field(default_factory=Platform.host)
    labels: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    cache: bool = True
    pull: bool = False
    plain_http: bool = False
    network: str = "default"
    say: Callable[[str], None] = field(default=lambda _: None)
    output: Callable[[bytes], None] = field(default=lambda _: None)


def build(
    store: Store,
    context: Path,
    dockerfile: str,
    runner: Runner,
    options: BuildOptions | None = None,
) -> Image:
    """Build an image.

    Args:
        store: Where it goes.
        context: The directory that COPY and ADD take files from.
        dockerfile: The Dockerfile's text.
        runner: Runs the RUN instructions.
        options: How.

    Raises:
        ConfigError: The Dockerfile is wrong; the message has the line.
        CommandError: A RUN failed.
        NotFoundError: A base image or a stage is missing.
    """
    return _Builder(store, context, dockerfile, runner, options or BuildOptions()).build()


def _ignore_of(context: Path) -> Ignore:
    try:
        return Ignore((context / ".dockerignore").read_text().splitlines())
    except FileNotFoundError:
        return Ignore()


class _Builder:
    def __init__(
        self,
        store: Store,
        context: Path,
        text: str,
        runner: Runner,
        options: BuildOptions,
    ) -> None:
        if not context.is_dir():
            msg = f"there is no directory {context} to build from"
            raise NotFoundError(msg)
        self._store = store
        self._options = options
        self._created, latest_ns = created_now()
        self._fixed = latest_ns is not None
        instructions = parse_dockerfile(text)
        self._stages, self._globals = stages_of(
            instructions,
            options.build_args,
            options.platform,
        )
        self._done: dict[int, StageState] = {}
        self._total = 0
        self._step = 0
        self._used: set[str] = set()
        self._steps = Steps(
            store=store,
            context=context,
            ignore=_ignore_of(context),
            runner=runner,
            cache=StepCache(store, use=options.cache),
            other=self._other,
            created=self._created,
            latest_ns=latest_ns,
            options=options,
        )

    def build(self) -> Image:
        with self._store.using():
            target = self._target()
            self._total = sum(len(self._stages[n].steps) + 1 for n in self._needed(target))
            state = self._stage(target)
            labels = {**state.config.labels, **self._options.labels}
            config = replace(state.config, labels=labels, created=self._time_of(state))
            names = self._options.tags or (None,)
            images = [add_image(self._store, name, config, tuple(state.layers)) for name in names]
        unknown = set(self._options.build_args) - self._used - set(self._globals) - PREDEFINED
        if unknown:
            self._options.say(f"build arguments that no ARG declares: {', '.join(sorted(unknown))}")
        return images[0]

    # -- stages ---------------------------------------------------------------------------------

    def _target(self) -> int:
        name = self._options.target
        if not name:
            return len(self._stages) - 1
        found = self._find(name, len(self._stages))
        if found is None:
            msg = f"the Dockerfile has no stage {name!r}"
            names = ", ".join(stage.name for stage in self._stages if stage.name)
            raise NotFoundError(msg, hint=f"it has: {names}" if names else "")
        return found

    def _find(self, name: str, before: int) -> int | None:
        """An earlier stage by its name or number."""
        for number in range(before - 1, -1, -1):
            if self._stages[number].name and self._stages[number].name == name.lower():
                return number
        if name.isdigit() and int(name) < before:
            return int(name)
        return None

    def _needed(self, target: int) -> set[int]:
        found: set[int] = set()
        pending = [target]
        while pending:
            number = pending.pop()
            if number in found:
                continue
            found.add(number)
            stage = self._stages[number]
            origins = [stage.origin]
            for step in stage.steps:
                origins.append(step.flag("from"))
                for mount in step.all_flags("mount"):
                    origins += [p[5:] for p in mount.split(",") if p.startswith("from=")]
            for origin in origins:
                other = self._find(origin, number) if origin else None
                if other is not None:
                    pending.append(other)
        return found

    def _other(self, name: str, stage: int) -> StageState:
        """What ``--from`` means: an earlier stage, else an image."""
        number = self._find(name, stage)
        if number is not None:
            return self._stage(number)
        return StageState.of_image(self._image(name, self._options.platform))

    def _image(self, name: str, platform: Platform) -> Image:
        options = self._options
        if not options.pull:
            try:
                return self._store.get(name, platform=platform)
            except NotFoundError:
                options.say(f"fetching {name}")
        return self._store.pull(name, platform=platform, plain_http=options.plain_http)

    def _begin(self, stage: Stage) -> StageState:
        if stage.origin.lower() == "scratch":
            config = ImageConfig(platform=self._options.platform, env=(DEFAULT_PATH,))
            return StageState(config=config, cmd_inherited=False)
        number = self._find(stage.origin, stage.number)
        if number is not None:
            before = self._stage(number)
            return StageState(config=before.config, layers=list(before.layers))
        platform = Platform.parse(stage.platform) if stage.platform else self._options.platform
        image = self._image(stage.origin, platform)
        state = StageState.of_image(image)
        triggers = [parse_dockerfile(text) for text in image.config.on_build]
        stage.steps[:0] = [step for found in triggers for step in found]
        self._total += len(triggers)
        return state

    def _stage(self, number: int) -> StageState:
        if number in self._done:
            return self._done[number]
        stage = self._stages[number]
        name = f" AS {stage.name}" if stage.name else ""
        self._say(f"FROM {stage.origin}{name}")
        state = self._begin(stage)
        for step in stage.steps:
            self._say(str(step))
            self._apply(step, state, number)
        self._done[number] = state
        return state

    def _say(self, text: str) -> None:
        self._step += 1
        first, *rest = text.splitlines()
        more = " ..." if rest else ""
        self._options.say(f"[{self._step}/{self._total}] {first}{more}")

    # -- instructions ---------------------------------------------------------------------------

    def _time_of(self, state: StageState) -> str:
        """When what is there so far was made: a build that makes nothing anew has the same result."""
        return self._created if self._fixed else state.config.created or _BEGINNING

    def _apply(self, step: Instruction, state: StageState, number: int) -> None:
        history = History(
            created=self._time_of(state),
            created_by=str(step),
            comment="ringfence build",
        )
        if step.name == "ARG":
            self._arg(step, state)
            state.add_history(history)
            return
        configure = CONFIGURE.get(step.name)
        try:
            if configure is not None:
                if step.name != "HEALTHCHECK":
                    step.allow_flags()
                configure(step, state)
                state.add_history(history)
                return
            layer = self._steps.make(step, state, number)
        except ConfigError as error:
            if error.message.startswith("Dockerfile line"):
                raise
            msg = f"Dockerfile line {step.line}: {step.name}: {error.message}"
            raise ConfigError(msg, hint=error.hint) from error
        if layer is None or layer.empty:
            state.add_history(history)
        else:
            state.config = replace(state.config, created=layer.created or self._created)
            state.add_layer(layer, replace(history, created=self._time_of(state)))

    def _arg(self, step: Instruction, state: StageState) -> None:
        automatic = platform_variables(self._options.platform)
        for name, default in arg_of(step, state.variables):
            self._used.add(name)
            value = self._options.build_args.get(name)
            if value is None:
                value = default if default is not None else self._globals.get(name)
            if value is None:
                value = automatic.get(name)
            if value is not None:
                state.args[name] = value
