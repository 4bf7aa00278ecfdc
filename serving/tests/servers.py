"""A server in a process of its own, and the openai client for it."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import openai

START_TIMEOUT = 180  # seconds


@contextmanager
def running(command: Sequence[str | Path], **environment: str) -> Iterator[openai.OpenAI]:
    """Runs a server on a free port, which must answer `/health` and still run in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*command, "--host", "127.0.0.1", "--port", port]
    with tempfile.TemporaryFile("w+") as log:

        def check_runs() -> None:
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"the server ended: {log.read()[-5000:]}")

        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while True:
                check_runs()
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert time.monotonic() < deadline, "the server did not start"
                    time.sleep(1)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
            check_runs()
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
