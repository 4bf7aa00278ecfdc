"""Training data: every form people have it in, bad records by name, the order, resuming, and `Trainer`."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, recorded_image
from transformers import AutoModel, AutoProcessor, Trainer, TrainerState, TrainingArguments

from training import DataError, Source, StreamOptions, TrainingLoader, attach_loader, check, read_examples
from training.loader import DataPosition
from training.records import Fields, read_conversation

try:
    import datasets
except ImportError:  # tests of Parquet files and data sets are skipped
    datasets = None

PICTURE = recorded_image(40, 30, 0)
QUESTION, ANSWER = "What is it?", "a wave"


def png(image=PICTURE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def llava(question=QUESTION, answer=ANSWER, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def write_lines(path: Path, records: list) -> Path:
    """A JSON Lines file of records, or of lines as bytes."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, columns: dict[str, list], image: str | None = None) -> Path:
    pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(columns)
    if image:
        data = data.cast_column(image, datasets.Image())
    data.to_parquet(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """Not the user's own."""
    if datasets is None:
        yield
        return
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


# -- forms of data -----------------------------------------------------------------------------------------------------


def package_lines(folder: Path) -> list[str]:
    parts = [{"type": "image", "path": "pictures/a.png"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]
    return [str(write_lines(folder / "a.jsonl", [{"messages": messages}]))]


def llava_array(folder: Path) -> list[str]:
    (folder / "a.json").write_text(json.dumps([llava(f"<image>\n{QUESTION}", image="pictures/a.png")], indent=1))
    return [str(folder / "a.json")]


def llava_without_placeholder(folder: Path) -> list[str]:
    return [str(write_lines(folder / "a.jsonl", [llava(image=["a.png"])])), f"image_folder={folder / 'pictures'}"]


def file_address(folder: Path) -> list[str]:
    return [str(write_lines(folder / "a.jsonl", [llava(image=f"file://{folder / 'pictures/a.png'}")]))]


def empty_parts_and_a_column(folder: Path) -> list[str]:
    parts = [{"type": "image", "image": None, "text": None}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]
    return [str(write_lines(folder / "a.jsonl", [{"messages": messages, "images": ["pictures/a.png"]}]))]


def question_pairs(folder: Path) -> list[str]:
    record = {"texts": [{"user": QUESTION, "assistant": ANSWER}], "images": ["pictures/a.png"]}
    return [str(write_lines(folder / "a.jsonl", [record]))]


def parquet_with_named_columns(folder: Path) -> list[str]:
    columns = {"query": [QUESTION], "label": [[ANSWER, "waves"]], "picture": [{"bytes": png(), "path": None}]}
    path = write_parquet(folder / "a.parquet", columns, "picture")
    return [str(path), "question=query", "answer=label", "image=picture"]


def folder_of_parquet(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    columns = {"question": [QUESTION], "answer": [ANSWER], "image": [{"bytes": png(), "path": None}]}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", columns, "image")
    return [str(folder / "data")]


def saved_data_set(folder: Path) -> list[str]:
    pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({**llava_columns(), "image": [str(folder / "pictures/a.png")]})
    data.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    return [str(folder / "saved")]


def streamed_parquet(folder: Path) -> list[str]:
    columns = {**llava_columns(), "image": [{"bytes": png(), "path": None}]}
    return [str(write_parquet(folder / "a.parquet", columns, "image")), "streaming=true"]


def llava_columns() -> dict[str, list]:
    return {"conversations": [llava()["conversations"]]}


def captioned_shards(folder: Path) -> list[str]:
    write_tar(folder / "00.tar", [("x/1.png", png()), ("x/1.txt", f"{ANSWER}\n".encode())])
    return [str(folder / "{00..00}.tar"), f"prompt={QUESTION}"]


def shards_with_json(folder: Path) -> list[str]:
    question = json.dumps({"question": QUESTION, "answer": ANSWER}).encode()
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "a.tar", [("1.JSON", question), ("1.png", png())])
    return [str(folder / "shards")]


FORMS = [
    *(package_lines, llava_array, llava_without_placeholder, file_address, empty_parts_and_a_column, question_pairs),
    *(parquet_with_named_columns, folder_of_parquet, saved_data_set, streamed_parquet),
    *(captioned_shards, shards_with_json),
]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_is_the_same_conversation(tiny, tmp_path, write):
    (tmp_path / "pictures").mkdir()
    PICTURE.save(tmp_path / "pictures" / "a.png")
    loader = one_epoch(
        [Source.parse(write(tmp_path))], tiny.processor.encode_conversation, tiny.processor.training_batch
    )
    [batch] = loader
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]
    expected = tiny.processor.training_batch([{"messages": messages}])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_each_placeholder_takes_the_next_image(tmp_path):
    names = [tmp_path / f"{name}.png" for name in "abc"]
    for name in names:
        PICTURE.save(name)
    turns = [
        ("system", "Be brief."),
        ("human", "<image>\nOne\n<image>Two"),
        ("gpt", "1"),
        ("user", "<image>\n"),
        ("assistant", "2"),
    ]
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    record = {"conversations": conversations, "image": list(map(str, names))}
    messages = read_conversation(record, Fields())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    contents = [[part.get("text", part.get("image")) for part in messages[index]["content"]] for index in (1, 3)]
    assert contents == [[str(names[0]), "One\n", str(names[1]), "Two"], [str(names[2])]]


def test_images_of_a_column_follow_the_placeholders_of_messages():
    messages = [{"role": "user", "content": "One <image> two"}, {"role": "assistant", "content": "three"}]
    [asked, _] = read_conversation({"messages": messages, "images": [png()]}, Fields())["messages"]
    assert [part["type"] for part in asked["content"]] == ["text", "image", "text"]
    [asked, _] = read_conversation({"messages": messages}, Fields())["messages"]
    assert asked["content"] == "One <image> two"  # without a column of images it is text, as in this package's form


def test_a_list_for_evaluation(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [llava(), b" ", llava(answer="")])
    assert read_examples([Source(str(path), fields=Fields({"conversations": "conversations"}))][:0]) == []
    with pytest.raises(DataError, match=r"a.jsonl:3: empty answer"):
        read_examples([Source(str(path))])
    write_lines(path, [llava()])
    [one] = read_examples([Source(str(path))])
    assert one["messages"][1] == {"role": "assistant", "content": ANSWER}


def test_elements_of_a_json_array_are_found_by_their_lines(tmp_path):
    path = tmp_path / "a.json"
    records = [llava('a "quoted" ], [ {'), llava("é\\"), llava(answer="")]
    text = "\ufeff [\n" + ",\n\n".join(json.dumps(one, indent=1, ensure_ascii=False) for one in records) + ", 7]\n"
    path.write_text(text, encoding="utf-8")
    loader = one_epoch([Source(str(path))], fake_encode, collect)
    assert sum(map(questions, loader), []) == ['a "quoted" ], [ {', "é\\"]
    starts = [index for index, line in enumerate(text.splitlines(), 1) if line == "{"]
    found = loader.bad_records.found
    assert [(name, bad.kind) for name, bad in found.items()] == [
        (f"{path}:{starts[2]}", "empty answer"),
        (f"{path}:{len(text.splitlines())}", "wrong type"),
    ]


def test_records_that_share_a_line_have_numbers(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([llava(answer=""), llava("good"), llava(answer=""), 7]))
    loader = one_epoch([Source(str(path))], fake_encode, collect)
    assert sum(map(questions, loader), []) == ["good"]
    assert set(loader.bad_records.found) == {f"{path}:1 (record {number})" for number in (1, 3, 4)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"messages": [}, {}]', "the JSON array does not end"),
        ("a.json", '[{}]\n{"a": 1}', "the JSON array does not end"),
        ("a.json", "[]", "has no record"),
        ("a.jsonl", "\n \n", "has no record"),
        ("a.docx", "x", "is none of .json"),
        ("a.parquet", "x", "cannot load"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Source(str(tmp_path / name)).open()


def test_names_that_lead_nowhere(tmp_path):
    for path in ("no.json", "no-*.jsonl", "no.parquet", "no/such-data-set", "no-*.tar"):
        with pytest.raises(DataError, match=re.escape(path)):
            Source(str(tmp_path / path)).open()


def test_a_data_set_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install 'datasets"):
        Source("some/data-set").open()


def test_words_of_a_source():
    words = ["a=b.json", "weight=0.3", "split=test[:5%]", "question=query", "streaming=true", "prompt=Say: x=1"]
    source = Source.parse(words)
    assert (source.path, source.weight, source.split, source.streaming) == ("a=b.json", 0.3, "test[:5%]", True)
    assert source.fields == Fields({"question": "query"}, "", "Say: x=1")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("wait=1", "weight, image_folder"),
        ("weight", "positive number, got ''"),
        ("weight=-1", "positive number, got -1"),
        ("weight=nan", "positive number, got nan"),
        ("streaming=yes", "true or false, got 'yes'"),
    ],
)
def test_words_that_say_nothing(word, message):
    with pytest.raises(ValueError, match=message):
        Source.parse(["a.json", word])


# -- bad records -------------------------------------------------------------------------------------------------------


def broken_records(folder: Path) -> list[tuple[str, object]]:
    """Twenty records, each broken in its own way, and the kinds that they are of."""
    (folder / "junk.png").write_bytes(b"junk")
    (folder / "cut.png").write_bytes(png(recorded_image(200, 200, 1))[:-3000])
    recorded_image(600, 2, 0).save(folder / "thin.png")
    turns = llava()["conversations"]
    return [
        ("not JSON", json.dumps(llava()).encode()[:-9]),
        ("not UTF-8", json.dumps(llava()).encode().replace(b"wave", b"w\xe4ve")),
        ("lone surrogate", llava("\ud800")),
        ("wrong type", [llava()]),
        ("wrong type", {"conversations": "human: Hi"}),
        ("wrong type", llava(answer=7)),
        ("wrong type", llava(image=7)),
        ("missing key", {"id": 5, "image": "good.png"}),
        ("missing key", {"conversations": [{"from": "human"}, turns[1]]}),
        ("missing key", {"question": QUESTION}),
        ("unknown role", {"conversations": [{"from": "robot", "value": "Hi"}, turns[1]]}),
        ("turn order", {"conversations": turns[::-1]}),
        ("empty answer", llava(answer=" \n")),
        ("image count", llava("<image><image>", image="good.png")),
        ("image in an answer", llava(answer="<image>", image="good.png")),
        ("missing image", llava(image="nowhere.png")),
        ("unreadable image", llava(image="junk.png")),
        ("unreadable image", llava(image="cut.png")),
        ("aspect ratio", llava(image="thin.png")),
        ("control token", llava(answer="<|im_end|>")),
        ("too long", llava("Hi " * 300)),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ten_thousand_records_with_a_hundred_broken_in_twenty_one_ways(tiny, tmp_path, num_workers):
    PICTURE.save(tmp_path / "good.png")
    ways = broken_records(tmp_path)
    assert len(ways) == 21
    broken = {100 * number + 7: ways[number % len(ways)] for number in range(100)}  # by line
    lines = [
        broken[line][1]
        if line in broken
        else llava(f"Question {line}?", **({"image": "good.png"} if line % 50 == 0 else {}))
        for line in range(1, 10_001)
    ]
    if num_workers:  # once at full size, once in workers
        lines = lines[:2100]
        broken = {line: way for line, way in broken.items() if line <= len(lines)}
    path = write_lines(tmp_path / "data.jsonl", lines)
    encode = partial(tiny.processor.encode_conversation, min_pixels=1024)
    settings = {"batch_size": 8, "max_tokens": 200, "num_workers": num_workers, "folder": tmp_path / "out"}
    loader = one_epoch([Source(str(path))], encode, tiny.processor.training_batch, **settings)
    delivered, rows = [], 0
    for batch in loader:
        delivered += loader.names
        rows += len(batch["input_ids"])
        assert len(loader.names) == len(batch["labels"]) and (batch["labels"] >= 0).any(1).all()
    good = [f"{path}:{line}" for line in range(1, len(lines) + 1) if line not in broken]
    assert sorted(delivered) == sorted(good) and rows == len(good)
    assert {name: bad.kind for name, bad in loader.bad_records.found.items()} == {
        f"{path}:{line}": kind for line, (kind, _) in broken.items()
    }
    written = [json.loads(line) for line in (tmp_path / "out" / "bad_records.rank0.jsonl").read_text().splitlines()]
    assert len(written) == len(broken) and all(bad["reason"] for bad in written)
    report = loader.report()
    assert report == (tmp_path / "out" / "bad_records.txt").read_text().strip()
    counts = Counter(kind for kind, _ in broken.values())
    assert f"{len(broken)} bad records" in report and f"{counts['wrong type']}  wrong type: {path}:" in report


@pytest.mark.parametrize("number", range(21))
def test_a_bad_record_stops_the_run_by_name(tiny, tmp_path, number):
    PICTURE.save(tmp_path / "good.png")
    kind, record = broken_records(tmp_path)[number]
    path = write_lines(tmp_path / "data.jsonl", [llava(), record])
    encode, collate = tiny.processor.encode_conversation, tiny.processor.training_batch
    loader = TrainingLoader([Source(str(path))], encode, collate, StreamOptions(max_tokens=200, shuffle=False))
    batches = iter(loader)
    next(batches)
    with pytest.raises(DataError, match=re.escape(f"{path}:2: {kind}: ")):
        next(batches)


def test_a_limit_of_bad_records(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b"{", llava(), b"{", llava(), b"{", llava()])
    options = StreamOptions(shuffle=False)
    loader = make_loader([Source(str(path))], options, on_error="skip", max_errors=2)
    batches = iter(loader)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(DataError, match=r"more than 2 bad records:\n3 bad records\n *3  not JSON: .*a.jsonl:1, "):
        next(batches)
    loader = make_loader([Source(str(path))], options, on_error="skip", max_errors=3)
    assert len(list(islice(endless(loader), 30))) == 30  # those of later epochs are the same three
    assert len(loader.bad_records.found) == 3


def test_data_without_a_good_record_is_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b"{"] * 3)
    with pytest.raises(DataError, match="no usable record in 10 epochs; the last was .*not JSON"):
        next(iter(make_loader([Source(str(path))], on_error="skip")))


@pytest.mark.parametrize("damage", ["header", "end"])
def test_a_damaged_shard_is_named_and_the_others_are_read(tmp_path, damage):
    for shard in "ab":
        files = [(f"{key}.{kind}", content) for key in "1234" for kind, content in (("png", png()), ("txt", b"text"))]
        write_tar(tmp_path / f"{shard}.tar", files)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as archive:
        third = archive.getmember("3.png").offset
    damaged = content[:third] + b"x" * 512 + content[third + 512 :] if damage == "header" else content[: third + 700]
    (tmp_path / "a.tar").write_bytes(damaged)
    loader = one_epoch([Source(str(tmp_path / "*.tar"))], fake_encode, collect, shuffle=False)
    names = [name for _ in loader for name in loader.names]
    whole = "1" if damage == "header" else "12"  # whether 2 has more files is not known behind a damaged header
    assert names == [*(f"{tmp_path}/a.tar {key}" for key in whole), *(f"{tmp_path}/b.tar {key}" for key in "1234")]
    [bad] = loader.bad_records.found.values()
    assert bad.name.startswith(f"{tmp_path}/a.tar at ") and bad.kind == "broken shard"


def test_bad_records_of_shards_and_tables(tmp_path):
    files = [("1.png", png()), ("2.txt", b"no picture"), ("3.json", b"{"), ("4.png", png()), ("4.txt", b"\xff")]
    write_tar(tmp_path / "a.tar", files)
    write_parquet(tmp_path / "a.parquet", {"question": ["a", "b"], "answer": ["c", None]})
    found = {}
    for name in ("a.tar", "a.parquet"):
        loader = one_epoch([Source(str(tmp_path / name))], fake_encode, collect)
        list(loader)
        found |= {name.removeprefix(f"{tmp_path}/"): bad.kind for name, bad in loader.bad_records.found.items()}
    assert found == {
        **{"a.tar 1": "missing key", "a.tar 2": "missing key", "a.tar 3": "not JSON", "a.tar 4": "not UTF-8"},
        "a.parquet train row 1": "missing key",
    }


def test_check_names_what_training_would_refuse(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", [llava(), llava(answer=""), llava()])
    options = ["--model", str(ROOT), "--subfolder", "tiny", "--data", str(path), "weight=2"]
    assert check.main([*options, "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "2 good records" in printed and f"1  empty answer: {path}:2" in printed
    write_lines(path, [llava()])
    assert check.main(options) == 0


# -- order, processes, workers, resuming -------------------------------------------------------------------------------


def fake_encode(example: dict) -> SimpleNamespace:
    text = example["messages"][-1]["content"]
    return SimpleNamespace(input_ids=range(len(text)), **example)


def collect(examples: list) -> dict:
    return {"examples": [vars(one) for one in examples]}


def make_loader(sources, options=None, **settings) -> TrainingLoader:
    return TrainingLoader(sources, fake_encode, collect, options or StreamOptions(), **settings)


def one_epoch(sources, encode, collate, folder=None, num_workers=0, **options) -> TrainingLoader:
    options = StreamOptions(epochs=1, **options)
    return TrainingLoader(sources, encode, collate, options, on_error="skip", folder=folder, num_workers=num_workers)


def endless(loader: TrainingLoader):
    while True:
        yield from loader


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Files with questions 0 to 28 in each form, every ninth broken: sources by form."""
    folder = tmp_path_factory.mktemp("numbered")
    records = [b"{" if number % 9 == 4 else llava(str(number), "x" * (1 + number % 5)) for number in range(29)]
    lines = write_lines(folder / "a.jsonl", records)
    for shard in range(3):
        numbers = range(29)[10 * shard : 10 * shard + 10]
        files = [(f"{n}.json", b"{" if n % 9 == 4 else json.dumps(llava(str(n), "x")).encode()) for n in numbers]
        write_tar(folder / f"{shard}.tar", files)
        columns = {"question": [str(n) for n in numbers], "answer": [None if n % 9 == 4 else "x" for n in numbers]}
        write_parquet(folder / f"{shard}.parquet", columns)
    return {
        "lines": [Source(str(lines))],
        "tar": [Source(str(folder / "{0..2}.tar"))],
        "stream": [Source(str(folder / "{0..2}.parquet"), streaming=True)],
        "weighted": [Source(str(lines), weight=3), Source(str(folder / "{0..2}.tar"), weight=1)],
    }


GOOD = sorted(str(number) for number in range(29) if number % 9 != 4)


def questions(batch: dict) -> list[str]:
    return [example["messages"][0]["content"] for example in batch["examples"]]


@pytest.mark.parametrize(
    ("form", "world_size", "num_workers"),
    [(form, world_size, 0) for form in ("lines", "tar", "stream") for world_size in (1, 3, 5)]
    + [("lines", 2, 2), ("stream", 1, 2)],
)
def test_processes_and_workers_see_every_record_once(numbered, form, world_size, num_workers):
    seen, bad = [], []
    for rank in range(world_size):
        options = StreamOptions(batch_size=2, shuffle_buffer=4, epochs=1)
        settings = {"on_error": "skip", "num_workers": num_workers, "rank": rank, "world_size": world_size}
        loader = make_loader(numbered[form], options, **settings)
        seen += [question for batch in loader for question in questions(batch)]
        bad += loader.bad_records.found
    assert sorted(seen) == GOOD and len(set(bad)) == len(bad) == 29 - len(GOOD)


@pytest.mark.parametrize("form", ["lines", "tar"])
def test_each_epoch_has_every_record_once_in_an_order_of_its_own(numbered, form):
    runs = []
    for seed in (0, 0, 1):
        loader = make_loader(numbered[form], StreamOptions(seed=seed, shuffle_buffer=8), on_error="skip")
        runs.append([question for batch in islice(endless(loader), 3 * len(GOOD)) for question in questions(batch)])
    epochs = [runs[0][start : start + len(GOOD)] for start in range(0, len(runs[0]), len(GOOD))]
    assert [sorted(epoch) for epoch in epochs] == [GOOD] * 3
    assert (
        runs[0] == runs[1] != runs[2]
        and epochs[0] != epochs[1] != epochs[2]
        and epochs[0] != sorted(epochs[0], key=int)
    )


@pytest.mark.parametrize(
    ("form", "num_workers"), [*((form, 0) for form in ("lines", "tar", "stream", "weighted")), ("weighted", 2)]
)
def test_a_run_resumes_exactly_where_it_stopped(numbered, form, num_workers):
    options = StreamOptions(batch_size=2, shuffle_buffer=4)

    def start() -> TrainingLoader:
        return make_loader(numbered[form], options, on_error="skip", num_workers=num_workers)

    whole = [questions(batch) for batch in islice(endless(start()), 40)]
    assert len({tuple(batch) for batch in whole}) > 20
    for taken in (1, 7, 12, 15, 25) if num_workers == 0 else (7,):
        loader = start()
        first = [questions(batch) for batch in islice(endless(loader), taken)]
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = start()
        resumed.load_state_dict(state)
        rest = [questions(batch) for batch in islice(endless(resumed), 40 - taken)]
        assert first + rest == whole


def pair_of_loaders(sources, options, state=None) -> list[TrainingLoader]:
    """Of two processes, at a position."""
    pair = [make_loader(sources, options, on_error="skip", rank=rank, world_size=2) for rank in (0, 1)]
    for loader in pair if state else ():
        loader.load_state_dict(state)
    return pair


def take(pair: list[TrainingLoader], steps: int) -> tuple[list[list[str]], dict]:
    """Batches of so many steps, and the state behind them as two processes gather it."""
    batches = [questions(next(own)) for both in [[*map(endless, pair)]] for _ in range(steps) for own in both]
    first, second = (loader.state_dict() for loader in pair)
    assert not first["positions"].keys() & second["positions"].keys()
    return batches, {**first, "positions": first["positions"] | second["positions"]}


@pytest.mark.parametrize("form", ["lines", "tar", "weighted"])
def test_two_processes_resume_and_one_continues_their_batches(numbered, form):
    options = StreamOptions(batch_size=2, shuffle_buffer=4)
    expected, _ = take(pair_of_loaders(numbered[form], options), 20)
    first, state = take(pair_of_loaders(numbered[form], options), 4)
    second, state = take(pair_of_loaders(numbered[form], options, state), 3)
    alone = make_loader(numbered[form], options, on_error="skip")
    alone.load_state_dict(json.loads(json.dumps(state)))
    rest = [questions(batch) for batch in islice(endless(alone), 26)]
    assert first + second + rest == expected


def test_weights_are_the_shares_of_the_examples(numbered):
    loader = make_loader(numbered["weighted"], StreamOptions(batch_size=10), on_error="skip")
    names = [name for _ in islice(endless(loader), 200) for name in loader.names]
    share = sum(".jsonl:" in name for name in names) / len(names)
    assert share == pytest.approx(0.75, abs=0.03)
    with pytest.raises(TypeError):
        len(loader)


def test_batches_of_at_most_so_many_tokens(numbered):
    options = StreamOptions(batch_size=100, batch_tokens=9, epochs=1)
    batches = list(make_loader(numbered["lines"], options, on_error="skip"))
    sizes = [sum(len(example["input_ids"]) for example in batch["examples"]) for batch in batches]
    assert max(sizes) <= 9 and sum(sizes) / len(sizes) > 6
    assert sorted(question for batch in batches for question in questions(batch)) == GOOD


def test_an_epoch_of_trainer_has_whole_steps(numbered):
    loader = make_loader(numbered["lines"], StreamOptions(batch_size=2), on_error="skip", accumulate=4)
    assert len(loader) == len(list(loader)) == 16 and loader.epoch == 1  # 29 records in steps of 8
    assert len(list(loader)) == 16 and loader.epoch == 2


def test_a_position_of_other_data_is_refused(numbered, tmp_path):
    state = make_loader(numbered["lines"]).state_dict()
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        make_loader(numbered["lines"], StreamOptions(seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="sources"):
        make_loader(numbered["tar"]).load_state_dict(state)
    with pytest.raises(ValueError, match="1 streams of data, which 1 processes with 2 workers"):
        make_loader(numbered["lines"], num_workers=2).load_state_dict(state)


def test_sources_that_cannot_be_mixed(numbered, tmp_path):
    lines, tar = numbered["lines"], numbered["tar"]
    with pytest.raises(ValueError, match=r"a weight each or with none, got the weights \[None, 3\]"):
        make_loader([*lines, numbered["weighted"][0]])
    with pytest.raises(ValueError, match="with weights only"):
        make_loader([*lines, *tar])
    with pytest.raises(ValueError, match="29 records cannot feed 32 streams"):
        make_loader(lines, num_workers=32)
    with pytest.raises(ValueError, match="no epochs"):
        make_loader(numbered["weighted"], StreamOptions(epochs=1))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        StreamOptions(batch_size=0)
    with pytest.raises(ValueError, match="on_error is stop, or skip"):
        make_loader(lines, on_error="warn")


# -- Trainer -----------------------------------------------------------------------------------------------------------


class RecordedLoader(TrainingLoader):
    """Appends the names of each batch to `file`."""

    file: Path

    def __iter__(self):
        for batch in super().__iter__():
            with self.file.open("a") as file:
                file.write(f"{' '.join(self.names)}\n")
            yield batch


class KilledTrainer(Trainer):
    """Kills its process in the training step with the given number."""

    kill_at = 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == self.kill_at - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


def train(model: str, data: str, output: str, kill_at: int = 0, resume: bool = False, **options) -> Trainer:
    """Eight steps on half-broken data, with a checkpoint every three."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    settings = {"max_steps": 8, "save_steps": 3, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "seed": 0}
    settings |= {"use_cpu": True, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "ignore_data_skip": True}
    args = TrainingArguments(output, **settings | options)
    trainer = KilledTrainer(AutoModel.from_pretrained(model, trust_remote_code=True), args)
    trainer.kill_at = kill_at
    loader = RecordedLoader(
        list(map(Source.parse, json.loads(data))),
        partial(processor.encode_conversation, min_pixels=1024),
        processor.training_batch,
        StreamOptions(batch_size=2, shuffle_buffer=5),
        on_error="skip",
        folder=Path(output),
        num_workers=2,
        accumulate=2,
    )
    loader.file = Path(output, "names.txt")
    loader.file.parent.mkdir(parents=True, exist_ok=True)
    attach_loader(trainer, loader)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def losses(trainer: Trainer) -> list[tuple[float, float]]:
    return [(row["loss"], row["epoch"]) for row in trainer.state.log_history if "loss" in row]


def half_broken(folder: Path, weights: tuple | None = None) -> str:
    """Sources for `train`: a file, or the file and a shard with weights."""
    records = [llava(str(number), "x" * number) if number % 4 else llava(str(number), "") for number in range(1, 20)]
    lines = str(write_lines(folder / "a.jsonl", records))
    if weights is None:
        return json.dumps([[lines]])
    files = [(f"{number}.json", json.dumps(one).encode()) for number, one in enumerate(records)]
    sources = [[lines], [str(write_tar(folder / "a.tar", files))]]
    return json.dumps([[*source, f"weight={weight}"] for source, weight in zip(sources, weights, strict=True)])


def test_a_run_killed_and_resumed_is_the_run_that_was_not(recordings, tmp_path):
    model, data = str(recordings["qwen3"].folder), half_broken(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(model, data, str(whole))
    script = (
        "import sys; sys.path.insert(0, 'tests'); import test_training_data as t; t.train(*sys.argv[1:], kill_at=6)"
    )
    command = [sys.executable, "-c", script, model, data, str(broken)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-3"]
    read = (broken / "names.txt").read_text().splitlines()
    resumed = train(model, data, str(broken), resume=True)
    read = read[:6] + (broken / "names.txt").read_text().splitlines()[len(read) :]
    assert read == (whole / "names.txt").read_text().splitlines() and len(read) == 16
    assert losses(resumed) == losses(expected) and len(losses(expected)) == 8
    lists = [(folder / "bad_records.rank0.jsonl").read_text().splitlines() for folder in (whole, broken)]
    assert sorted(lists[0]) == sorted(lists[1]) and len(lists[0]) == len(set(lists[0])) > 0


def test_a_mixture_resumes_from_a_checkpoint(recordings, tmp_path):
    model, data = str(recordings["qwen3"].folder), half_broken(tmp_path, weights=(1, 2))
    expected = train(model, data, str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    resumed = train(model, data, str(tmp_path / "out"), resume=True)
    names = (tmp_path / "out" / "names.txt").read_text().splitlines()
    assert names[6:16] == names[16:] and any(".tar" in name for name in names) and any(".jsonl" in n for n in names)
    assert losses(resumed) == losses(expected)


def test_tiny_trains_through_broken_records(tiny, tmp_path):
    PICTURE.save(tmp_path / "good.png")
    broken = [record for _, record in broken_records(tmp_path)]
    good = [llava(f"Question {number}?", image="good.png") for number in range(7)]
    path = write_lines(tmp_path / "a.jsonl", good + broken)
    arguments = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    model = AutoModel.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), num_train_epochs=1, ignore_data_skip=True, **arguments))
    encode = partial(tiny.processor.encode_conversation, min_pixels=1024)
    options = StreamOptions(batch_size=7, max_tokens=200)
    loader = TrainingLoader(
        [Source(str(path))], encode, tiny.processor.training_batch, options, "skip", folder=tmp_path
    )
    attach_loader(trainer, loader)
    trainer.train()
    assert [epoch for _, epoch in losses(trainer)] == [0.25, 0.5, 0.75, 1.0]  # 28 records, and 28 examples delivered
    assert loader.bad_records.found.keys() == {f"{path}:{line}" for line in range(8, 29)}
    assert "21 bad records" in (tmp_path / "bad_records.txt").read_text()


def test_a_trainer_that_would_skip_or_end_early_is_refused(numbered, tmp_path):
    trainer = SimpleNamespace(args=SimpleNamespace(ignore_data_skip=False))
    with pytest.raises(ValueError, match="ignore_data_skip=True"):
        attach_loader(trainer, make_loader(numbered["lines"]))
    trainer.args.ignore_data_skip = True
    with pytest.raises(ValueError, match="epochs must be None, got 1"):
        attach_loader(trainer, make_loader(numbered["lines"], StreamOptions(epochs=1)))


@pytest.mark.parametrize("saved", [{}, {"training_data": {"step": 2}}])
def test_a_checkpoint_without_its_position_is_refused(numbered, saved):
    state = TrainerState(global_step=3, stateful_callbacks=saved)
    with pytest.raises(ValueError, match="step 3 has no position in the training data"):
        DataPosition(make_loader(numbered["lines"])).on_train_begin(None, state, None)


def test_kinds_of_bad_records_are_documented(tmp_path):
    documented = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "data.md").read_text(), flags=re.MULTILINE)
    kinds = {kind for kind, _ in broken_records(tmp_path)} | {"broken shard", "other"}
    assert kinds <= set(documented)


def test_python_of_the_data_guide_runs(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "receipts.jsonl", [llava(str(number)) for number in range(4)])
    Path("shards").mkdir()
    for shard in ("00", "01"):
        write_tar(tmp_path / "shards" / f"{shard}.tar", [("1.json", json.dumps(llava()).encode()), ("1.png", png())])
    [script] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL)
    script = script.replace("weights/navil-2b", str(recordings["internlm2"].folder))
    exec(compile(script, "docs/data.md", "exec"), {})
    assert re.search(r"receipts.jsonl:\d|shards/0\d.tar 1", capsys.readouterr().out.splitlines()[-1])
