"""The documented path of `open_cache`: reading rows without torch.

The code is in `cache_service.rows`. This is a package and not a module beside `errors.py` because
`cache_service` imports none of its sub-packages, which all import it.
"""

from cache_service.rows.reader import Cache, open_cache

__all__ = ["Cache", "open_cache"]
