"""Finding an app by the name that people write on a command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tidegate.sdk.app import App, default_app
from tidegate.sdk.errors import AppError


def load_app(target: str) -> App:
    """Import and return the app that `module:attribute` or `path/file.py:attribute` names; looks in this folder too.

    Without `:attribute` it is the module's only App, or the default app if the module decorates with `tidegate.tool`
    and the like. Its signatures are checked. Raises AppError; an error inside the module passes through as it is.
    """
    module_name, _, attribute = target.partition(":")
    module = _import(module_name)
    app = getattr(module, attribute, None) if attribute else _only_app(module)
    if not isinstance(app, App):
        raise AppError(f"{target!r}: no App named {attribute!r} in {module_name}")
    app.check()
    return app


def _import(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py":
        return _import_file(path)
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # a module that the app's own module imports
        raise AppError(f"there is no module {name!r} here ({folder}) or among the installed ones") from None


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise AppError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _only_app(module: ModuleType) -> App:
    found = {id(value): value for value in vars(module).values() if isinstance(value, App)}
    apps = list(found.values())
    if len(apps) == 1:
        return apps[0]
    if not apps and default_app.functions:
        return default_app
    how = f"{len(apps)} apps" if apps else "no app and no function decorated with tidegate.tool, step or agent"
    raise AppError(f"{module.__name__} has {how}: name one as {module.__name__}:ATTRIBUTE")
