"""Conversions in processes of their own, which test_conversion_safety.py kills or keeps from writing.

They are forked from a server that has never run a thread. A fork of the test process itself may wait for ever for a
lock that one of its threads held.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import convert_checkpoint

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "convert_checkpoint"])  # each process has imported them already
LONGEST = 120  # seconds
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile", "os.listdir"}


class Child:
    """A process that calls `work(*arguments)`; when this is made, it is about to."""

    def __init__(self, work: Callable, *arguments: Any):
        self._results, results = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_run, args=(results, work, arguments))
        self._process.start()
        results.close()
        assert self._results.poll(LONGEST)
        self._results.recv()

    def result(self) -> Any:
        """What `work` returns; None of a process that was killed."""
        result = None
        with contextlib.suppress(EOFError):
            assert self._results.poll(LONGEST)
            result = self._results.recv()
        self._process.join(LONGEST)
        assert result is not None or self._process.exitcode == -signal.SIGKILL
        return result


def _run(results: Connection, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    results.send("ready")
    results.send(work(*arguments))


def convert(source: Path, destination: Path) -> int:
    return convert_checkpoint.main(["official", str(source), str(destination), "--max-shard-size", "200KB"])


def convert_counting(source: Path, destination: Path, stop_at: int | None = None) -> int:
    """Converts; ends this process with SIGKILL just before its file event of that number. Returns their count."""
    count = 0
    folders = (str(source.parent), str(destination.parent))

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(folders):
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    assert convert(source, destination) == 0
    return count


def run_with_full_disk(arguments: list[str], limit: int) -> tuple[int, str]:
    """Exit code and output where no file may grow beyond `limit` bytes, which the system answers as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = convert_checkpoint.main(arguments)
    return code, output.getvalue()
