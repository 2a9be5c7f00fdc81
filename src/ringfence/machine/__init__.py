"""Machines: what they are, which engine runs them, and their lives."""

from __future__ import annotations
