"""Names that users write in a config file to the Python objects that they mean.

Models, datasets and pipelines of users are made by factories, `module:name` or `file.py:name`.
Whatever goes wrong in finding, importing or calling one is an error of one line that names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from cache_service.errors import ConfigError, KdCacheError
from cache_service.human_format import describe_error

_FORMS = "write module:name or path/to/file.py:name"

_PACKAGE = str(Path(__file__).parent) + os.sep
_LIBRARIES = tuple(
    sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def load_object(path: str) -> Any:
    """The object named `module:name` or `path/to/file.py:name`.

    Modules are looked up as usual, then in the current directory. A file is run once per process,
    and finds modules in its own folder. `name` may have dots: `module:Networks.small`. What the
    code prints goes to stderr, because stdout is for the command's own report.

    Raises:
        ConfigError: the form is wrong, the module, the file or the name in it does not exist, or
            running it raised an error.
    """
    module_name, colon, name = path.rpartition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{path!r} names no Python object;", hint=f"{_FORMS}.")
    found: Any = _load_module(module_name, asked=path)
    module = found
    for part in name.split("."):
        if not hasattr(found, part):
            close = [n for n in dir(found) if n.lower() == part.lower()]
            hint = f"Did you mean {close[0]!r}?" if close else f"Define it, or {_FORMS}."
            raise ConfigError(
                f"{path!r}: {_place(module, module_name)} has no {name!r}.", hint=hint
            )
        found = getattr(found, part)
    return found


def call_factory(
    path: str,
    arguments: Mapping[str, Any],
    *,
    makes: str,
    given_in: str = "",
    optional: Collection[str] = (),
    error: type[KdCacheError] = ConfigError,
) -> Any:
    """Load the factory `module:name` or `file.py:name` and call it.

    Args:
        path: names the factory: a function, a class or anything else that can be called.
        arguments: its keyword arguments.
        makes: what it makes, for messages: "model".
        given_in: key of the config file that holds further arguments, for messages.
        optional: those arguments that are left out if the factory does not take them.
        error: class of the error if the factory cannot be called or fails.

    Raises:
        ConfigError: there is no such object; see `load_object`.
        KdCacheError: of class `error`: it cannot be called, does not take these arguments or needs
            others, or raised an error. Errors of this project leave it unchanged.
    """
    factory = load_object(path)
    if not callable(factory) or inspect.iscoroutinefunction(factory):
        kind = "coroutine function" if callable(factory) else type(factory).__name__
        raise error(
            f"{makes} {path} is a {kind}, not a function.",
            hint=f"Name a function or a class that makes the {makes}.",
        )
    taken = _taken(factory, path, arguments, makes, given_in, optional, error)
    with errors_in_one_line(f"{makes} {path} failed", error):
        return factory(**taken)


def _taken(
    factory: Any,
    path: str,
    arguments: Mapping[str, Any],
    makes: str,
    given_in: str,
    optional: Collection[str],
    error: type[KdCacheError],
) -> dict[str, Any]:
    """The arguments that the factory takes, after the checks of their names."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none
        return dict(arguments)
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {k: v for k, v in arguments.items() if k in named or takes_any or k not in optional}
    unknown = [] if takes_any else sorted(taken.keys() - named)
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and (p.name not in taken or p.kind is p.POSITIONAL_ONLY)
    ]
    problems = [f"does not take {', '.join(unknown)}"] if unknown else []
    problems += [f"needs {', '.join(missing)}"] if missing else []
    if problems:
        where = f"Arguments are given in {given_in}."
        if not given_in:
            where = f"Name a function without arguments that makes the {makes}."
        raise error(
            f"{makes} {path} {' and '.join(problems)}.",
            hint=f"It takes {_one_line_signature(signature)}. {where}",
        )
    return taken


def _one_line_signature(signature: inspect.Signature) -> str:
    """Names and defaults, without annotations."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return "no arguments" if text == "()" else " ".join(text.split())


def _load_module(module_name: str, *, asked: str) -> ModuleType:
    _look_in(Path.cwd())
    importlib.invalidate_caches()
    with errors_in_one_line(f"{asked!r}: importing {module_name} failed", ConfigError):
        try:
            if module_name.endswith(".py"):
                return _run_file(Path(module_name).expanduser().resolve(), asked=asked)
            return importlib.import_module(module_name)
        except (ImportError, SyntaxError) as problem:
            raise ConfigError(
                f"{asked!r}: importing {module_name} failed: {problem}.",
                hint=_import_hint(problem, module_name),
            ) from problem


def _import_hint(problem: ImportError | SyntaxError, module_name: str) -> str:
    missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
    if missing and module_name != missing and not module_name.startswith(f"{missing}."):
        return f"Install {missing}, or run from the directory that holds it."
    if "relative import" in str(problem):
        return "Write package.module:name, and run from the folder that holds the package."
    if isinstance(problem, SyntaxError):
        return "Correct that line."
    return f"Run from the directory that holds it, or {_FORMS}."


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that a file of the user's never shadows a library


def _run_file(file: Path, *, asked: str) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"{asked!r}: there is no file {file}.", hint=f"{_FORMS.capitalize()}.")
    # Two files of one name must not be one module; the same file must be, however it is spelled.
    name = f"{file.stem}_{blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    _look_in(file.parent)
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


def _place(module: ModuleType, name: str) -> str:
    """The module's name, and its file if the name does not tell which one was found."""
    file = getattr(module, "__file__", None)
    return f"{name} ({file})" if file and not name.endswith(".py") else name


@contextmanager
def errors_in_one_line(problem: str, error: type[KdCacheError]) -> Iterator[None]:
    """Turn what a user's code raises into one line with the place in that code.

    Args:
        problem: beginning of the message.
        error: class to raise.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KdCacheError:
        raise
    except SystemExit as caught:
        raise error(
            f"{problem}: it ended the program{raised_in(caught)}.",
            hint='Code that parses arguments or exits belongs below `if __name__ == "__main__":`.',
        ) from caught
    except Exception as caught:
        raise error(f"{problem}: {_described(caught)}.") from caught


def _described(caught: BaseException) -> str:
    return describe_error(caught).rstrip(".") + raised_in(caught)


def raised_in(caught: BaseException) -> str:
    """The last line of the user's own code that the error passed: ` (nets.py, line 12)`."""
    frames = traceback.extract_tb(caught.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, *_LIBRARIES, "<"))]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
