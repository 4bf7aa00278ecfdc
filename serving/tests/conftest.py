"""Model folders, and the package's own answers, which those of vLLM are compared with."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

os.environ |= {
    "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="navil-serving-modules-"),
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, for tests that change it
    "TORCH_COMPILE_DISABLE": "1",
}
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from cases import conversations  # noqa: E402
from filelock import FileLock  # noqa: E402
from package import answers, load  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402

import convert_checkpoint  # noqa: E402


@dataclass
class Checkpoint:
    folder: Path

    @cached_property
    def answers(self) -> dict[str, dict]:
        """The package's answers to all conversations, computed once for all processes of the tests."""
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
        file = Path(tempfile.gettempdir()) / f"{self.folder.name}-answers-{run}.pt"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                torch.save(answers(load(self.folder), self.folder, conversations()), file)
        return torch.load(file)


def make_folder(folder: Path, command: str, source: Path) -> None:
    """A model folder that keeps small pictures small: more scales, and less work."""
    assert convert_checkpoint.main([command, str(source), str(folder)]) == 0
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"min_pixels": 16 * 16**2, "max_pixels": 512 * 16**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny") / "navil-tiny-served"
    make_folder(folder, "bundle", ROOT / "tiny")
    return Checkpoint(folder)


@pytest.fixture(scope="session")
def window(tmp_path_factory) -> Checkpoint:
    """A converted checkpoint, whose visual tokens are in window order, with random weights.

    vLLM's kernels for CPUs want heads of at least 32 features, the recorded checkpoints have 16.
    """
    folder = tmp_path_factory.mktemp("window") / "navil-window-served"
    make_folder(folder, "official", ROOT / "tests" / "fixtures" / "internlm2")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.vision_config.visual_token_order == "window"
    config.text_config.head_dim = 64
    torch.manual_seed(0)
    model = AutoModel.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return Checkpoint(folder)
