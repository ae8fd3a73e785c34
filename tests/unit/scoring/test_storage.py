"""Storage: what is found, and that what exists is never replaced."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.errors import ConfigError, StorageError
from app.scoring.storage import Storage


@pytest.fixture
def data(tmp_path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "_bad/d.jsonl", ".hidden", "other.csv"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("at", "names"),
    [
        ("", ["a.jsonl", "b.jsonl", "other.csv", "c.jsonl"]),
        ("b.jsonl", ["b.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c.jsonl"]),
        ("o", ["other.csv"]),
        ("nothing", []),
    ],
)
def test_input_is_a_file_a_folder_a_pattern_or_how_names_begin(data, at, names):
    inputs = Storage(f"{data}/{at}", "INPUT").find()
    assert sorted(Path(each.path).name for each in inputs) == sorted(names)
    assert [each.path for each in inputs] == sorted(each.path for each in inputs)


def test_a_file_that_is_written_anew_has_another_version(data):
    storage = Storage(str(data / "a.jsonl"), "INPUT")
    (before,) = storage.find()
    os.utime(data / "a.jsonl", ns=(1, 1))
    assert storage.version(before.path) != before.version


def create(storage: Storage, name: str, data: bytes) -> bool:
    return storage.create_bytes(name, data)


def test_of_many_who_create_one_wins_and_its_bytes_stay(tmp_path):
    storage = Storage(str(tmp_path / "out"), "OUTPUT")
    contents = [bytes([number]) * 100_000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda data: create(storage, "sub/name", data), contents))
    assert won.count(True) == 1
    assert storage.read("sub/name") == contents[won.index(True)]
    assert not create(storage, "sub/name", b"later")
    assert storage.names("sub") == {"name"}
    storage.tidy()
    assert storage.names() == {"sub"}


def test_others_may_read_what_was_created(tmp_path):
    create(Storage(str(tmp_path / "out"), "OUTPUT"), "name", b"data")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "out/name").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_one_who_writes_while_all_is_tidied_has_lost_or_fails(tmp_path):
    storage = Storage(str(tmp_path / "out"), "OUTPUT")
    create(storage, "name", b"first")
    with storage.staged() as file:
        storage.tidy()
        assert not storage.create("name", file)
    with storage.staged() as file:
        storage.tidy()
        with pytest.raises(StorageError, match="not found"):
            storage.create("another", file)


@pytest.mark.parametrize("url", ["", "https://host/data", "simplecache::s3://bucket/data", "memory://data"])
def test_an_address_of_another_kind_is_refused(url):
    with pytest.raises(ConfigError, match="OUTPUT: "):
        Storage(url, "OUTPUT")


def test_no_credentials_of_an_address_are_shown():
    assert str(Storage("s3://key:secret@bucket/data@home", "INPUT")) == "s3://bucket/data@home"


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        create(Storage(str(tmp_path / "file/out"), "OUTPUT"), "name", b"")
