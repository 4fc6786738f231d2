"""A Python that starts at once: its programs run in forks of a process that has imported torch, transformers and mpo.

For tests that run several programs of mpo, each of which would import for seconds. `forking_python` forks a server, in which no
thread runs, and gives an executable for the place of `sys.executable`. The executable sends its words, folder, environment and open
files to the server, which forks. Signals are passed on; the executable ends as the program ends, and the program with the
executable. Of Python's own flags it knows -u, -m and -c; what is called in another way starts a Python of its own.
"""

import atexit
import contextlib
import importlib
import json
import logging
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def forking_python():
    """Yield the path of the executable."""
    from small_runs import warm_up

    import mpo

    for module in ("matplotlib.pyplot", "openai.types", *(found.name for found in pkgutil.walk_packages(mpo.__path__, "mpo."))):
        with contextlib.suppress(ImportError):  # of a package of an extra
            importlib.import_module(module)
    warm_up()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        path = Path(folder, "python")
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "{folder}/socket" "$@"\n')
        path.chmod(0o755)
        server = _forked(_serve, listener, str(path), os.getpid())
        try:
            yield str(path)
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)


def _forked(work: Callable[..., None], *arguments: Any, close: Iterable[socket.socket] = ()) -> int:
    child = os.fork()
    if child == 0:
        try:
            for connection in close:
                connection.close()
            work(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def _serve(listener: socket.socket, path: str, parent: int) -> None:
    sys.executable = path  # what a program starts in its turn is forked too
    atexit._clear()  # what the parent is to do at its end
    logging.root.handlers.clear()  # of pytest
    running: dict[int, socket.socket] = {}  # programs, and who asked for them
    ends: dict[int, int] = {}  # descriptors of these programs' processes -> programs
    while os.getppid() == parent:
        ready, *_ = select.select([listener, *running.values(), *ends], [], [], 10)
        for one in ready:
            if one is listener:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError, ValueError):  # an executable that is killed while it asks
                    _, files, *_ = socket.recv_fds(connection, 1, 3)
                    asked = json.loads(connection.makefile().readline())
                    program = _forked(_run, files, *asked, close=[listener, *running.values(), connection])
                    running[program] = connection
                    ends[os.pidfd_open(program)] = program
                    for file in files:
                        os.close(file)
                    connection.sendall(b"%d\n" % program)
            elif one in ends:
                program = ends.pop(one)
                os.close(one)
                status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
                with contextlib.suppress(OSError), running.pop(program) as connection:
                    connection.sendall(b"%d\n" % status)
            else:  # the executable has ended
                for program, connection in running.items():
                    if connection is one:
                        os.kill(program, signal.SIGKILL)


def _run(files: list[int], words: list[str], folder: str, environment: dict[str, str]) -> None:
    status = 1
    try:
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        sys.stdin, sys.stdout, sys.stderr = (open(place, "r" if place == 0 else "w", closefd=False) for place in range(3))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        import torch
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # that of `warm_up`, of one process
        torch.set_num_threads(torch.get_num_threads())  # a pool of this process, before several threads ask for one at once
        how, program, *arguments = words
        sys.argv = [program if how == "-m" else "-c", *arguments]
        sys.path.insert(0, folder)
        if how == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.modules.pop(program if program != "mpo" else "mpo.__main__", None)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ask(address: str, words: list[str]) -> None:
    """What the executable does."""
    asked = [words, os.getcwd(), dict(os.environ)]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(asked).encode() + b"\n")
        said = server.makefile()
        program = int(said.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(program, number))
        status = int(said.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    asked_for = [word for word in sys.argv[2:] if word != "-u"]
    if asked_for[:1] not in (["-m"], ["-c"]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
    _ask(sys.argv[1], asked_for)
