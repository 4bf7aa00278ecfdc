"""convert_checkpoint.py survives: killed or out of space, DST is absent or complete; and no source leads it astray."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from filelock import FileLock
from safetensors.torch import load_file, save_file

import checkpoint_files as files
import convert_checkpoint as converter

pytest.importorskip("resource", reason="needs POSIX")

from conversion_worker import Child, convert, convert_counting, run_with_full_disk  # noqa: E402


@pytest.fixture
def source(tmp_path) -> Path:
    """A released checkpoint in four shards."""
    folder = tmp_path / "in" / "source"
    shutil.copytree(FIXTURES / "internlm2", folder, ignore=shutil.ignore_patterns("cases*"))
    split(folder)
    return folder


def split(folder: Path, suffix: str = "safetensors") -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(4):
        names = list(tensors)[number::4]
        weight_map |= dict.fromkeys(names, f"part-{number}.{suffix}")
        part = {name: tensors[name] for name in names}
        path = folder / f"part-{number}.{suffix}"
        torch.save(part, path) if suffix == "bin" else save_file(part, path)
    index = files.PICKLE_INDEX_NAME if suffix == "bin" else files.INDEX_NAME
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(source, tmp_path) -> dict[str, bytes]:
    assert convert(source, tmp_path / "expected" / "navil") == 0
    return contents(tmp_path / "expected" / "navil")


def test_killed_before_any_file_event(source, expected, tmp_path):
    """Every file that the conversion opens, makes, renames or removes is a point at which it is killed once."""
    destination = tmp_path / "out" / "navil"
    total = Child(convert_counting, source, destination).result()
    assert contents(destination) == expected
    outcomes = set()
    # All of the last points, where the folder takes its name, and every fourth of the others.
    for point in (*range(0, total - 12, 4), *range(total - 12, total)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert Child(convert_counting, source, destination, point).result() is None
        outcomes.add(destination.exists())
        if destination.exists():
            assert contents(destination) == expected
    assert outcomes == {False, True}
    shutil.rmtree(destination)
    assert Child(convert, source, destination).result() == 0
    assert contents(destination) == expected
    assert [path.name for path in destination.parent.iterdir()] == ["navil"]  # nothing of the killed runs is left


def test_killed_at_any_time(source, expected, tmp_path):
    destination = tmp_path / "out" / "navil"
    child = Child(convert, source, destination)
    begin = time.monotonic()
    assert child.result() == 0
    duration = time.monotonic() - begin
    shutil.rmtree(destination)
    for part in range(24):
        child = Child(convert, source, destination)
        time.sleep(duration * part / 20)
        child.kill()
        assert child.result() in (None, 0)
        if destination.exists():
            assert contents(destination) == expected
            shutil.rmtree(destination)
    assert convert(source, destination) == 0
    assert contents(destination) == expected


@pytest.mark.parametrize("limit", [0, 100, 3_000, 50_000, 150_000, 190_000])
@pytest.mark.parametrize("command", ["official", "from-llm", "export"])
def test_full_disk(source, tmp_path, command, limit):
    if command == "export":
        assert convert(source, tmp_path / "in" / "navil") == 0
        source = tmp_path / "in" / "navil"
    elif command == "from-llm":
        from test_conversion_from_llm import write_llm

        source = tmp_path / "in" / "llm"
        write_llm(source, model_type="llama")
    destination = tmp_path / "out" / "result"
    arguments = [command, str(source), str(destination), "--max-shard-size", "200KB"]
    arguments += ["--vision-size", "2x64"] if command == "from-llm" else []
    code, message = Child(run_with_full_disk, arguments, limit).result()
    assert code == 1 and "error: " in message, message
    assert list(destination.parent.iterdir()) == []
    assert converter.main(arguments) == 0


def test_one_at_a_time(source, tmp_path, capsys):
    destination = tmp_path / "out" / "navil"
    with files.new_folder(destination) as building:
        (building / "mine").touch()
        assert convert(source, destination) == 1
        assert "another process is writing" in capsys.readouterr().err
        assert (building / "mine").exists()
    assert [path.name for path in destination.iterdir()] == ["mine"]


def test_the_lock_is_not_removed_while_it_is_held(source, tmp_path, monkeypatch):
    """Windows removes no open file."""
    release, unlink, released = FileLock.release, os.unlink, []

    def note_release(lock, *arguments, **options):
        release(lock, *arguments, **options)
        released.append(lock.lock_file)

    def remove(path, *arguments, **options):
        assert not str(path).endswith(".lock") or released, "the lock is still open"
        unlink(path, *arguments, **options)

    monkeypatch.setattr(FileLock, "release", note_release)
    monkeypatch.setattr(os, "unlink", remove)
    assert convert(source, tmp_path / "out" / "navil") == 0
    assert released and [path.name for path in (tmp_path / "out").iterdir()] == ["navil"]


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tmp_path) -> Path:
    folder = tmp_path / "pickled"
    shutil.copytree(FIXTURES / "internlm2", folder, ignore=shutil.ignore_patterns("cases*", "*.safetensors"))
    torch.save(load_file(FIXTURES / "internlm2" / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


class Trap:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_read_only_when_allowed(source, pickled, expected, tmp_path, capsys):
    assert convert(pickled, tmp_path / "out") == 1
    assert "--allow-pickle" in capsys.readouterr().err
    sharded = tmp_path / "sharded"
    shutil.copytree(FIXTURES / "internlm2", sharded, ignore=shutil.ignore_patterns("cases*"))
    split(sharded, "bin")
    for folder in (pickled, sharded):
        destination = tmp_path / f"from-{folder.name}"
        arguments = [str(folder), str(destination), "--max-shard-size", "200KB", "--allow-pickle"]
        assert converter.main(["official", *arguments]) == 0
        weights = {name: content for name, content in contents(destination).items() if "safetensors" in name}
        assert weights == {name: content for name, content in expected.items() if "safetensors" in name}


def test_pickles_run_nothing(pickled, tmp_path, capsys):
    for content in (
        {"a": Trap(tmp_path / "executed")},
        {"a": torch.nn.Linear(2, 2)},
        {"a": {"b": torch.zeros(1)}},
        [torch.zeros(1)],
    ):
        torch.save(content, pickled / "pytorch_model.bin")
        assert converter.main(["official", str(pickled), str(tmp_path / "out"), "--allow-pickle"]) == 1
        assert "pytorch_model.bin" in capsys.readouterr().err
    for content in (b"", b"garbage", b"cos\nsystem\n(S'false'\ntR."):
        (pickled / "pytorch_model.bin").write_bytes(content)
        assert converter.main(["official", str(pickled), str(tmp_path / "out"), "--allow-pickle"]) == 1
        assert "cannot read" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("../part-0.safetensors", "/etc/hostname", "sub/part-0.safetensors", "sub/../part-0.safetensors", "..", "."),
        *("", "./part-0.safetensors", "link.safetensors", "dangling.safetensors", "~/part-0.safetensors"),
    ],
)
def test_index_cannot_lead_out_of_the_folder(source, tmp_path, capsys, name):
    outside = source.parent / "part-0.safetensors"
    shutil.copy(source / "part-0.safetensors", outside)
    (source / "sub").mkdir()
    shutil.copy(outside, source / "sub")
    if name == "link.safetensors":
        (source / name).symlink_to(outside)
    (source / "dangling.safetensors").symlink_to(source / "absent")
    (source / "part-0.safetensors").rename(source / "moved")
    index = json.loads((source / files.INDEX_NAME).read_text())
    index["weight_map"] = {
        tensor: name if shard == "part-0.safetensors" else shard for tensor, shard in index["weight_map"].items()
    }
    (source / files.INDEX_NAME).write_text(json.dumps(index))
    assert convert(source, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert ("is a link to" if name == "link.safetensors" else "not a file in") in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight_map", [None, [], "part-0.safetensors", {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_index_must_be_an_index(source, tmp_path, capsys, weight_map):
    (source / files.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert convert(source, tmp_path / "out") == 1
    assert "has no weight_map of file names" in capsys.readouterr().err


def test_index_must_name_the_shard_of_a_tensor(source, tmp_path, capsys):
    index = json.loads((source / files.INDEX_NAME).read_text())
    name = min(index["weight_map"])
    index["weight_map"][name] = f"part-{(int(index['weight_map'][name][5]) + 1) % 4}.safetensors"
    (source / files.INDEX_NAME).write_text(json.dumps(index))
    assert convert(source, tmp_path / "out") == 1
    assert f"disagree about {name}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["official", "tokenizer", "export", "verify", "from-llm"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model"])
def test_no_file_may_be_a_link_out_of_the_folder(source, tmp_path, capsys, command, name):
    secret = tmp_path / "secret"
    secret.write_text("not to be published")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    assert converter.main([command, str(source), *([str(tmp_path / "out")] if command != "verify" else [])]) == 1
    assert f"{source / name} is a link to {secret}, out of the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_and_of_a_hub_cache_are_followed(source, expected, tmp_path):
    (source / "stored").mkdir()
    (source / "part-0.safetensors").rename(source / "stored" / "real")
    (source / "part-0.safetensors").symlink_to("stored/real")
    assert convert(source, tmp_path / "inside") == 0
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in filter(Path.is_file, source.iterdir()):
        shutil.copy(path, blobs)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert convert(snapshot, tmp_path / "cached") == 0
    for name in ("inside", "cached"):
        weights = {name: content for name, content in contents(tmp_path / name).items() if "safetensors" in name}
        assert weights == {name: content for name, content in expected.items() if "safetensors" in name}


# -- tensors one at a time ---------------------------------------------------------------------------------------------


def test_only_one_tensor_is_held(tmp_path):
    """Each tensor has gone before the next is made, however large the file."""
    import weakref

    alive: list[weakref.ref] = []

    def make(index: int) -> torch.Tensor:
        assert all(tensor() is None for tensor in alive)
        tensor = torch.full((3, 5), index, dtype=torch.float32)
        alive.append(weakref.ref(tensor))
        return tensor

    plans = {
        f"t{index}": files.TensorPlan(torch.float32, (3, 5), lambda index=index: make(index)) for index in range(20)
    }
    files.write_weights(plans, tmp_path, "1GB")
    assert len(alive) == 20
    stored = load_file(tmp_path / "model.safetensors")
    assert all((stored[f"t{index}"] == index).all() for index in range(20))


def test_files_are_what_the_library_reads_and_writes(tmp_path):
    tensors = {
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.5),
        "double": torch.randn(2, 3).double(),
        "empty": torch.zeros(0, 4),
        "brain": torch.randn(5, 2, 2).bfloat16(),
        'näme "quoted"': torch.randn(1),
        "transposed": torch.randn(4, 6).T,
    }
    plans = {
        name: files.TensorPlan(tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }
    files.write_weights(plans, tmp_path, "1GB")
    stored = load_file(tmp_path / "model.safetensors")
    read = files.Tensors.in_folder(tmp_path)
    assert stored.keys() == tensors.keys() == read.shapes.keys()
    for name, tensor in tensors.items():
        for again in (stored[name], read[name]):
            assert again.dtype == tensor.dtype and torch.equal(again, tensor)
    (tmp_path / "model.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    read = files.Tensors.in_folder(tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
