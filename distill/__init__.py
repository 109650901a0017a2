"""Everything a student needs: rows, replayed views, losses, a trainer."""

from __future__ import annotations

from distill.data import CachedDataset, load_cache

__all__ = ["CachedDataset", "load_cache"]
