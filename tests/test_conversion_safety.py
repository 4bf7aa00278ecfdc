"""convert_checkpoint.py survives: killed or out of space, DST is absent or complete; and no source leads it astray."""

import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from conversion_helpers import INDEX, WEIGHTS, copy_released, edit_json, read_json, refusal, split, weights, write_llm
from safetensors.torch import save_file

import convert_checkpoint
from conversion.files import new_folder
from conversion.names import Rule
from conversion.plan import Plan
from conversion.read import Tensors, open_tensors
from conversion.write import write_weights

pytest.importorskip("resource", reason="needs POSIX")

from conversion_worker import Child, convert, convert_counting, run_with_full_disk  # noqa: E402


@pytest.fixture
def source(tmp_path) -> Path:
    """A released checkpoint in four shards."""
    (tmp_path / "in").mkdir()
    folder = copy_released(tmp_path / "in" / "source", "internlm2")
    split(folder, 4)
    return folder


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
    # All of the last points, where the folder takes its name, and every eighth of the others.
    for point in (*range(0, total - 12, 8), *range(total - 12, total)):
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


@pytest.mark.parametrize("command", ["official", "from-llm", "export"])
def test_full_disk(source, tmp_path, command):
    options = ["--max-shard-size", "200KB"]
    if command == "export":
        assert convert(source, tmp_path / "in" / "navil") == 0
        source = tmp_path / "in" / "navil"
    elif command == "from-llm":
        source = tmp_path / "in" / "llm"
        write_llm(source, model_type="llama")
        options += ["--vision-size", "2x64"]
    destination = tmp_path / "out" / "result"
    arguments = [command, str(source), str(destination), *options]
    for limit in (0, 100, 3_000, 50_000, 150_000, 190_000):  # bytes of a file
        code, message = Child(run_with_full_disk, arguments, limit).result()
        assert code == 1 and "error: " in message, message
        assert list(destination.parent.iterdir()) == []
    assert convert_checkpoint.main(arguments) == 0


def test_one_at_a_time(source, tmp_path, capsys):
    destination = tmp_path / "out" / "navil"
    with new_folder(destination) as building:
        (building / "mine").touch()
        assert convert(source, destination) == 1
        assert "another process is writing" in capsys.readouterr().err
        assert (building / "mine").exists()
    assert [path.name for path in destination.iterdir()] == ["mine"]


# -- pickles -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def pickled(tmp_path) -> Path:
    folder = copy_released(tmp_path / "pickled", "internlm2", "*.safetensors")
    torch.save(weights(FIXTURES / "internlm2"), folder / "pytorch_model.bin")
    return folder


class Trap:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def stored_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if "safetensors" in name}


def test_pickles_are_read_only_when_allowed(pickled, expected, tmp_path, capsys):
    sharded = copy_released(tmp_path / "sharded", "internlm2")
    split(sharded, 4, "bin")
    for folder in (pickled, sharded):
        destination = tmp_path / f"from-{folder.name}"
        assert "--allow-pickle" in refusal(capsys, "official", folder, destination)
        arguments = [str(folder), str(destination), "--max-shard-size", "200KB", "--allow-pickle"]
        assert convert_checkpoint.main(["official", *arguments]) == 0
        assert stored_weights(contents(destination)) == stored_weights(expected)
    (sharded / "pytorch_model.bin.index.json").rename(sharded / INDEX)  # pickles under the other index
    assert "cannot read" in refusal(capsys, "official", sharded, tmp_path / "out")


def test_pickles_run_nothing(pickled, tmp_path, capsys):
    path, trap = pickled / "pytorch_model.bin", Trap(tmp_path / "executed")
    for content in ({"a": trap}, {"a": torch.nn.Linear(2, 2)}, {"a": {"b": torch.zeros(1)}}, [torch.zeros(1)]):
        torch.save(content, path)
        assert path.name in refusal(capsys, "official", pickled, tmp_path / "out", "--allow-pickle")
    for content in (b"", b"garbage", b"cos\nsystem\n(S'false'\ntR."):
        path.write_bytes(content)
        assert "cannot read" in refusal(capsys, "official", pickled, tmp_path / "out", "--allow-pickle")
    assert not trap.path.exists()


# -- paths -------------------------------------------------------------------------------------------------------------
SHARD = "part-0.safetensors"
SHARD_NAMES = [f"../{SHARD}", "/etc/hostname", f"sub/{SHARD}", f"sub/../{SHARD}", "..", ".", "", f"./{SHARD}"]
SHARD_NAMES += ["link.safetensors", "dangling.safetensors", f"~/{SHARD}"]


@pytest.mark.parametrize("name", SHARD_NAMES)
def test_index_cannot_lead_out_of_the_folder(source, tmp_path, capsys, name):
    outside = source.parent / SHARD
    shutil.copy(source / SHARD, outside)
    (source / "sub").mkdir()
    shutil.copy(outside, source / "sub")
    if name == "link.safetensors":
        (source / name).symlink_to(outside)
    (source / "dangling.safetensors").symlink_to(source / "absent")
    (source / SHARD).rename(source / "moved")
    weight_map = read_json(source / INDEX)["weight_map"]
    renamed = {tensor: name if shard == SHARD else shard for tensor, shard in weight_map.items()}
    edit_json(source / INDEX, weight_map=renamed)
    message = refusal(capsys, "official", source, tmp_path / "out")
    assert ("is a link to" if name == "link.safetensors" else f"names {name!r}, which is not a file in") in message


@pytest.mark.parametrize("weight_map", [None, [], SHARD, {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_index_must_be_an_index(source, tmp_path, capsys, weight_map):
    edit_json(source / INDEX, weight_map=weight_map)
    assert "has no weight_map of file names" in refusal(capsys, "official", source, tmp_path / "out")


def test_index_must_name_the_shard_of_a_tensor(source, tmp_path, capsys):
    weight_map = read_json(source / INDEX)["weight_map"]
    name = min(weight_map)
    edit_json(source / INDEX, "weight_map", **{name: f"part-{(int(weight_map[name][5]) + 1) % 4}.safetensors"})
    assert f"disagree about {name}" in refusal(capsys, "official", source, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model"])
def test_no_file_may_be_a_link_out_of_the_folder(source, tmp_path, capsys, name):
    secret = tmp_path / "secret"
    secret.write_text("not to be published")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    message = f"{source / name} is a link to {secret}, out of the folder"
    for command in ("official", "tokenizer", "export", "from-llm"):
        assert message in refusal(capsys, command, source, tmp_path / "out")
    assert convert_checkpoint.main(["verify", str(source)]) == 1
    assert message in capsys.readouterr().err


def test_links_inside_the_folder_and_of_a_hub_cache_are_followed(source, expected, tmp_path):
    (source / "stored").mkdir()
    (source / SHARD).rename(source / "stored" / "real")
    (source / SHARD).symlink_to("stored/real")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in filter(Path.is_file, source.iterdir()):
        shutil.copy(path, blobs)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    for folder, destination in ((source, tmp_path / "inside"), (snapshot, tmp_path / "cached")):
        assert convert(folder, destination) == 0
        assert stored_weights(contents(destination)) == stored_weights(expected)


# -- tensors one at a time ---------------------------------------------------------------------------------------------
def test_only_one_tensor_is_held(tmp_path):
    """Each tensor has gone before the next is made, however large the file."""
    alive: list[weakref.ref] = []

    def make(index: int) -> list[torch.Tensor]:
        assert sum(tensor() is not None for tensor in alive) <= 1  # the checksum thread may be about to return the last
        tensor = torch.full((3, 5), index, dtype=torch.float32)
        alive.append(weakref.ref(tensor))
        return [tensor]

    rules = [Rule({f"t{index}": (3, 5)}, {}, lambda index=index: make(index)) for index in range(20)]
    write_weights(Plan(rules, Tensors(), torch.float32), tmp_path, "1GB")
    assert len(alive) == 20
    stored = weights(tmp_path)
    assert all((stored[f"t{index}"] == index).all() for index in range(20))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_files_are_what_the_library_reads_and_writes(tmp_path, dtype):
    shapes = {"scalar": (), "empty": (0, 4), "odd": (5, 3, 1), 'näme "quoted"': (1,), "transposed": (6, 4)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors["transposed"] = tensors["transposed"].T
    rules = [Rule({name: tuple(t.shape)}, {}, lambda tensor=t: [tensor]) for name, t in tensors.items()]
    write_weights(Plan(rules, Tensors(), dtype), tmp_path, "1GB")
    (tmp_path / "again").mkdir()
    written, read = weights(tmp_path), open_tensors(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "again" / WEIGHTS)
    for stored in (written, read, open_tensors(tmp_path / "again")):
        for name, tensor in tensors.items():
            assert stored[name].dtype == dtype and torch.equal(stored[name], tensor)
    assert written.keys() == tensors.keys() == read.shapes.keys()
