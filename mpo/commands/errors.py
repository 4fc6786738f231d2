"""Errors of users: one message instead of a traceback."""

import os
import sys
from collections.abc import Callable

from mpo.visible import visible

_NO_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def user_errors(work: Callable[[], int], who: str = "") -> int:
    """Run `work`. Print a user's error as one message instead of a traceback (MPO_TRACEBACK=1 shows the traceback).

    A missing or unreadable file is a user's error too.
    """
    try:
        return work()
    except (ValueError, FloatingPointError, *_NO_FILE) as error:
        if os.environ.get("MPO_TRACEBACK") or (isinstance(error, OSError) and error.filename is None):
            raise
        message: object = error
        if isinstance(error, OSError):
            message = f"{error.filename}: {error.strerror}. Check that the file exists and that its path is correct."
        print(visible(f"mpo: error: {who}{message}"), file=sys.stderr)
        return 2
