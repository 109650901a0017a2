"""Property tests of the format try the same cases on every machine."""

from __future__ import annotations

import support.repeatable  # noqa: F401  loads the profile
