"""The errors that users see: each class has a stable code, an HTTP status and an exit code.

A message states what was requested, what was found, and what to type next. It is one line, because
the command line prints it as it is and the service sends it as the `detail` of a problem document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class KdCacheError(Exception):
    """Base class. `hint` is the part of the message that states what to type next; may be empty."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the class, the message and the hint: errors leave loader worker processes."""
        return (_rebuild, (type(self), self.message, self.hint))

    def as_document(self) -> dict[str, Any]:
        """The error as JSON, for another process; see `error_from_document`."""
        return {
            "code": self.code,
            "status": self.http_status,
            "detail": self.message,
            "hint": self.hint,
        }


def error_from_document(document: Mapping[str, Any]) -> KdCacheError:
    """The error of `as_document`; a `KdCacheError` if the code is none of this module's."""
    kinds = {kind.code: kind for kind in KdCacheError.__subclasses__()}
    kind = kinds.get(document["code"], KdCacheError)
    return kind(document["detail"], hint=document["hint"])


def _rebuild(kind: type[KdCacheError], message: str, hint: str) -> KdCacheError:
    return kind(message, hint=hint)


class ConfigError(KdCacheError):
    """A setting, a file or an argument is not usable as given."""

    code = "config"
    http_status = 422
    exit_code = 2


class UnsupportedError(KdCacheError):
    """A model, codec or method exists but cannot do what is required of it."""

    code = "unsupported"
    http_status = 422
    exit_code = 2


class NotACacheError(KdCacheError):
    """Nothing at this address is a cache of a format this version reads."""

    code = "not_a_cache"
    http_status = 404
    exit_code = 2


class DatasetError(KdCacheError):
    """The dataset named cannot be opened."""

    code = "dataset"
    http_status = 422
    exit_code = 2


class SpecMismatchError(KdCacheError):
    """The cache is of another teacher, recipe, dataset or codec than the one required."""

    code = "spec_mismatch"
    http_status = 409
    exit_code = 3


class CorruptError(KdCacheError):
    """Stored bytes are not the bytes that were committed."""

    code = "corrupt"
    http_status = 500
    exit_code = 3


class ViewDriftError(KdCacheError):
    """A replayed view is not the view that the teacher saw."""

    code = "view_drift"
    http_status = 409
    exit_code = 3


class UnreadableSampleError(KdCacheError):
    """A sample of the dataset cannot be decoded."""

    code = "unreadable_sample"
    http_status = 500
    exit_code = 3


class UntrainedTeacherError(KdCacheError):
    """The teacher is hardly better than chance on the dataset to be recorded."""

    code = "untrained_teacher"
    http_status = 409
    exit_code = 3


class NonFiniteError(KdCacheError):
    """A teacher's logit or a loss is NaN, infinite, or beyond what its codec can hold."""

    code = "non_finite"
    http_status = 500
    exit_code = 3


class RowsNotBuiltError(KdCacheError):
    """The requested rows are not recorded (yet)."""

    code = "rows_not_built"
    http_status = 404
    exit_code = 4


class OutOfSpaceError(KdCacheError):
    """The storage is full. What was committed stays good; the same command resumes."""

    code = "out_of_space"
    http_status = 507
    exit_code = 4


class WorkersError(KdCacheError):
    """Worker processes cannot start, died or hang. The same command goes on where it stopped."""

    code = "workers"
    http_status = 500
    exit_code = 4


class StorageError(KdCacheError):
    """The storage cannot be reached or refuses access."""

    code = "storage"
    http_status = 503
    exit_code = 1
