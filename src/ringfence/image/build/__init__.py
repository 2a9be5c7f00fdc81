"""Images built from Dockerfiles."""

from __future__ import annotations

from ringfence.image.build.builder import BuildOptions, build
from ringfence.image.build.runner import RunMount, Runner, RunStep

__all__ = ["BuildOptions", "RunMount", "RunStep", "Runner", "build"]
