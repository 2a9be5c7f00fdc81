"""Run any program, container image or operating system in an isolated machine."""

from __future__ import annotations
