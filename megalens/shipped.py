"""Files that come with megalens, found from any folder: the experiments of ``conf/`` and the engine files of ``ds_configs/``."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("conf", "ds_configs")
_PACKAGE = Path(__file__).resolve().parent
_WHEEL = _PACKAGE / "_files"  # setup.py copies FOLDERS there when it builds a wheel
HOME = _WHEEL if _WHEEL.is_dir() else _PACKAGE.parent


def find(path: str | Path) -> Path:
    """``path``, or megalens' own file of that name where nothing lies at ``path``.

    Only relative paths below :data:`FOLDERS`, such as ``conf/tiny.yaml``, name a file of megalens.
    """
    path = Path(path)
    if path.exists() or path.is_absolute() or path.parts[:1] not in [(folder,) for folder in FOLDERS]:
        return path
    own = HOME / path
    return own if own.exists() else path
