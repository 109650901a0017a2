"""Hypothesis for a suite that must not flake: the same cases every time, and no stopwatch."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
