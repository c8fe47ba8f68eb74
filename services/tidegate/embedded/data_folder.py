"""The folder that a stack keeps its data in: held by one stack at a time, and emptied only if a stack made it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import BinaryIO, Final

MARKER: Final = ".tidegate-data"
MADE: Final = b"Made by Tidegate. `tidegate dev --fresh` removes everything in this folder.\n"
FOUND: Final = b"Used by Tidegate, but there were files before: `tidegate dev --fresh` leaves this folder alone.\n"


class DataFolderError(RuntimeError):
    """The folder cannot be used, or must not be emptied; the message says why and what to do."""


class DataFolder:
    """A folder with a marker file in it. The marker says whose the content is, and its lock that a stack uses it now.

    The lock ends with this process, however it ends. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._held: BinaryIO | None = None

    def hold(self) -> None:
        """Make the folder if need be and keep other stacks out of it until `release`. Idempotent. Raises DataFolderError."""
        if self._held is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            marker = (self.path / MARKER).open("a+b")
        except OSError as error:
            raise DataFolderError(f"{self.path} cannot be used for data: {error.strerror}") from None
        self._lock(marker)
        if not os.fstat(marker.fileno()).st_size:
            marker.write(FOUND if self._content() else MADE)
            marker.flush()
        self._held = marker

    def release(self) -> None:
        """Let others use the folder. Idempotent."""
        if self._held is not None:
            fcntl.flock(self._held, fcntl.LOCK_UN)  # closing would not do while a child is being started
            self._held.close()
            self._held = None

    def empty(self) -> None:
        """Remove everything in the folder but the marker. Does nothing if there is no folder, or nothing in it.

        Raises DataFolderError and removes nothing if a stack uses the folder, if the content is not, or may not be, a
        stack's alone, or if the user works or lives there.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise DataFolderError(f"{self.path} is not a folder")
        if not self._content():
            return
        real = self.path.resolve()
        if any(place.resolve().is_relative_to(real) for place in (Path.cwd(), Path.home())):
            raise DataFolderError(
                f"{self.path} is not emptied: it is, or holds, the current folder or your home. Name another --data-dir."
            )
        try:
            marker = (self.path / MARKER).open("r+b")
        except OSError:
            raise self._not_ours() from None
        self._lock(marker)
        with marker:
            if marker.read() != MADE:
                raise self._not_ours()
            self._remove_content()

    def _content(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.name != MARKER]

    def _remove_content(self) -> None:
        try:
            for path in self._content():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise DataFolderError(f"{self.path} could not be emptied: {error}") from None

    def _lock(self, marker: BinaryIO) -> None:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            marker.close()
            raise DataFolderError(
                f"{self.path} is in use by a Tidegate that runs. Stop that one, or name another --data-dir."
            ) from None

    def _not_ours(self) -> DataFolderError:
        return DataFolderError(
            f"{self.path} is not emptied: it holds files that Tidegate may not have made. Name another --data-dir, or "
            "remove the folder yourself if nothing in it is needed."
        )
