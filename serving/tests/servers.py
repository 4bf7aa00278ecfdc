"""A server in a process of its own, and the openai client for it."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import openai
import psutil
import requests

START_TIMEOUT = 300  # seconds
MIB = 2**20


def wait_until(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.1)


@dataclass
class Server:
    url: str
    process: subprocess.Popen
    log: Path

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def check_runs(self) -> None:
        assert self.process.poll() is None, f"the server ended: {self.log.read_text()[-5000:]}"

    def is_healthy(self) -> bool:
        self.check_runs()
        try:
            return requests.get(f"{self.url}/health", timeout=60).ok
        except requests.ConnectionError:
            return False

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = requests.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def memory(self) -> float:
        """MiB of RAM of the server's processes."""
        server = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [server, *server.children(recursive=True)]) / MIB


@contextmanager
def running(command: Sequence[str | Path], **environment: str) -> Iterator[Server]:
    """Runs a server on a free port, which must answer `/health` and still run in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*command, "--host", "127.0.0.1", "--port", port]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        server = Server(f"http://127.0.0.1:{port}", process, Path(log.name))
        try:
            wait_until(server.is_healthy, START_TIMEOUT, "the server did not start")
            yield server
            server.check_runs()
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
