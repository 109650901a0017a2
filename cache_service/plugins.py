"""Names that users write in a config file to the Python objects that they mean."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from cache_service.errors import ConfigError

_FORMS = "write module:name or path/to/file.py:name"


def load_object(path: str) -> Any:
    """The object named `module:name` or `path/to/file.py:name`.

    Modules are looked up as usual, then in the current directory. A file is run once per process.

    Raises:
        ConfigError: the form is wrong, or the module, the file or the name in it does not exist.
    """
    module_name, colon, name = path.rpartition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{path!r} names no Python object;", hint=f"{_FORMS}.")
    module = _load_module(module_name, asked=path)
    if not hasattr(module, name):
        close = [n for n in vars(module) if n.lower() == name.lower()]
        hint = f"Did you mean {close[0]!r}?" if close else f"Define it, or {_FORMS}."
        raise ConfigError(f"{path!r}: {module_name} has no {name!r}.", hint=hint)
    return getattr(module, name)


def _load_module(module_name: str, *, asked: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that a file of the user's never shadows a library
    importlib.invalidate_caches()
    try:
        if module_name.endswith(".py"):
            return _run_file(Path(module_name).resolve(), asked=asked)
        return importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{asked!r}: importing {module_name} failed: {error}.",
            hint=f"Run from the directory that holds it, or {_FORMS}.",
        ) from error


def _run_file(file: Path, *, asked: str) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"{asked!r}: there is no file {file}.", hint=f"{_FORMS.capitalize()}.")
    # Two files of one name must not be one module; the same file must be, however it is spelled.
    name = f"{file.stem}_{blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None  # both hold for any name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
