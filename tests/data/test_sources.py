"""Every format yields the same documents, and every kind of broken data is named."""

import gzip
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from conf.errors import UserError
from conf.schema import DataFormat, MixSource
from train.data import readers
from train.data.readers import TEXT_PIECE_BYTES
from train.data.sources import open_source

TEXTS = ["one\n", "zwei \u00e4\u00f6\u00fc", "\u4e09\n\n", "four " * 1000, "five\x00"]


def lines(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": number, key: text}).encode() + b"\n" for number, text in enumerate(texts))


def documents(path: Path | str, **settings: object) -> list[tuple[str, str]]:
    return list(open_source(MixSource(str(path), **settings), "data.path").documents())


def error_of(path: Path | str, **settings: object) -> UserError:
    with pytest.raises(UserError) as caught:
        documents(path, **settings)
    assert caught.value.field == "data.path" and caught.value.cure
    return caught.value


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_json_lines_plain_and_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines(TEXTS)) + pack(b"\n" + lines(["next member"])))  # both formats allow several members
    found = documents(path)
    assert [text for _, text in found] == [*TEXTS, "next member"]
    assert [name for name, _ in found][-2:] == [f"a.jsonl{suffix}:5", f"a.jsonl{suffix}:7"]


def test_parquet_and_a_folder_of_files(tmp_path):
    for part in ("a", "b"):
        rows = pyarrow.table({"body": [f"{part}{text}" for text in TEXTS] + [None], "n": list(range(6))})
        pyarrow.parquet.write_table(rows, tmp_path / f"{part}.parquet", row_group_size=2)
    found = documents(tmp_path, text_key="body")
    assert [text for _, text in found] == [part + text for part in "ab" for text in TEXTS]
    assert found[5][0] == "b.parquet:0"


def test_text_folder_leaves_out_hidden_binary_and_empty_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "z.md": b"last",
        "sub/any.suffix": "\u00fc".encode(),
        "none": b"no suffix",
        "empty.txt": b"",
        ".hidden": b"x",
        ".git/config": b"x",
        "picture.png": b"\x89PNG\0\0",
    }.items():
        (tmp_path / name).write_bytes(content)
    source = open_source(MixSource(str(tmp_path)), "data.path")
    assert list(source.documents()) == [("none", "no suffix"), ("sub/any.suffix", "\u00fc"), ("z.md", "last")]
    assert source.notes() == [f"{tmp_path}: left out 1 binary files"]


@pytest.mark.slow
def test_a_long_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    path = tmp_path / "long.txt"
    text = "".join(f"line {number} \u00e4\n" for number in range(TEXT_PIECE_BYTES // 9))
    path.write_text(text + "\u4e09" * (TEXT_PIECE_BYTES // 2), encoding="utf-8")  # the tail has no line end to cut at
    found = documents(path)
    assert "".join(piece for _, piece in found) == path.read_text(encoding="utf-8")
    assert [name for name, _ in found] == ["long.txt", *(f"long.txt#{number}" for number in range(1, len(found)))]
    assert (
        found[0][1].endswith("\n")
        and all(len(piece.encode()) <= TEXT_PIECE_BYTES for _, piece in found)
        and len(found) >= 3
    )


def test_the_standard_library_is_there_in_order_without_tests():
    source = open_source(MixSource(format=DataFormat.stdlib), "data.path")
    names = [file.name for file in source.files]
    assert names == sorted(names) and len(names) > 400
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "test" in name.split("/")]


def test_wrong_bytes_are_named_with_their_place(tmp_path):
    (tmp_path / "good.txt").write_bytes(b"fine")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    error = error_of(tmp_path)
    assert str(error.value).endswith("latin.txt") and "byte 3 is 0xe9" in error.rule
    tail = tmp_path / "late.txt"
    tail.write_bytes(b"a" * (TEXT_PIECE_BYTES - 1) + b"\n" + b"b" * 10 + b"\xff")
    assert f"byte {TEXT_PIECE_BYTES + 10} is 0xff" in error_of(tail).rule


@pytest.mark.parametrize(
    "line, part",
    [
        (b"{oops", "not JSON"),
        (b'{"body": "x"}', "has no key 'text', only: body"),
        (b"[1]", "must be an object with the text under 'text', and is a list"),
        (b'{"text": 3}', "has a int, not a string"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, part):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["good"]) + line + b"\n")
    error = error_of(path)
    assert part in error.rule and str(error.value).startswith(str(path))
    assert str(error.value) == f"{path}:2" or "byte" in error.rule


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    """Programs on Windows begin files in UTF-8 with one."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(["one", "two"]))
    assert documents(path) == [("a.jsonl:1", "one"), ("a.jsonl:2", "two")]


@pytest.mark.parametrize(
    "name, pack",
    [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress)],
)
def test_damaged_archives_are_refused(tmp_path, name, pack):
    path, whole = tmp_path / name, pack(lines([f"{number} {number * 7919 % 10007}" for number in range(9000)]))
    for broken in (whole[:-20], whole[: len(whole) // 2], b"no archive at all"):
        path.write_bytes(broken)
        assert "is damaged" in error_of(path).rule
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"????????" + whole[middle + 8 :])
    error_of(path)  # noticed by a line that is not JSON, or at the latest by the checksum at the end


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bytes])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    path = tmp_path / f"a.jsonl{SUFFIXES[pack]}"
    path.write_bytes(pack(lines(["fine"]) + b" " * (1 << 21) + b"\n"))
    error = error_of(path)
    assert str(error.value) == f"{path}:2" and "longer than 1 MiB" in error.rule
    path.write_bytes(pack(b'"' + b"x" * ((1 << 20) - 3) + b'"\n'))
    assert "must be an object" in error_of(path).rule, "a line of exactly that length is read"


SUFFIXES = {gzip.compress: ".gz", zstandard.compress: ".zst", bytes: ""}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(readers, "FREE", 1 << 20)
    path = tmp_path / f"a.jsonl{SUFFIXES[pack]}"
    path.write_bytes(pack(lines(["fine"]) + (b" " * 1000 + b"\n") * 10_000))
    monkeypatch.setattr(readers, "LARGEST_RATIO", 100)
    assert "unpacks to more than 100 times as much" in error_of(path).rule
    monkeypatch.setattr(readers, "FREE", 1 << 30)
    assert [text for _, text in documents(path)] == ["fine"], "small files may"


def test_one_piece_of_zstandard_unpacks_to_little(tmp_path, monkeypatch):
    """4 bytes can become 128 KiB, so what is unpacked in one call must be small."""
    made = []
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b" " * (1 << 28)))
    decompressor = zstandard.ZstdDecompressor

    class Watched:
        def __init__(self, **settings):
            self._inner = decompressor(**settings)

        def decompressobj(self):
            inner = self._inner.decompressobj()
            return SimpleNamespace(decompress=lambda data: made.append(inner.decompress(data)) or made[-1], eof=False)

    monkeypatch.setattr(zstandard, "ZstdDecompressor", Watched)
    assert "longer than" in error_of(path).rule and max(map(len, made)) <= 1 << 27


def test_json_that_is_nested_too_deep_is_refused_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for opening in (b"[", b'{"text":'):
        path.write_bytes(lines(["fine"]) + opening * 100_000 + b"\n")
        error = error_of(path)
        assert str(error.value) == f"{path}:2" and "too many nested levels" in error.rule


def test_damaged_parquet_and_wrong_columns_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2]}), path)
    assert "has no column 'text', only: n" in error_of(path).rule
    assert "has a int" in error_of(path, text_key="n").rule
    path.write_bytes(path.read_bytes()[:-30])
    assert "is damaged" in error_of(path).rule


def test_missing_empty_and_unclear_paths(tmp_path):
    assert "no such file" in error_of(tmp_path / "absent").rule
    assert "has no text files" in error_of(tmp_path).rule
    (tmp_path / "a.txt").write_bytes(b"x")
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    error = error_of(tmp_path)
    assert "jsonl and text" in error.rule and "data.format" in error.cure
    assert documents(tmp_path, format=DataFormat.jsonl) == [("a.jsonl:1", "x")]
    assert "has no parquet files" in error_of(tmp_path, format=DataFormat.parquet).rule


def test_a_sample_comes_from_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.sources.SHARE", 100)
    for number in range(20):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(["x" * 60] * 50))
    source = open_source(MixSource(str(tmp_path)), "data.path")
    names = [name.split(".")[0] for name, _ in source.sample(4000)]
    assert len(set(names)) == 20 and len(names) < 20 * 50
    assert len(list(source.sample(10**9))) == 1000


def test_hugging_face_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": [f"row {row}" for row in range(600)], "n": list(range(600))})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select(range(3))).save_to_disk(tmp_path / "two")
    assert documents(f"hf://{tmp_path}/one")[599] == ("train:599", "row 599")
    assert documents(tmp_path / "one") == documents(f"hf://{tmp_path}/two")
    assert len(documents(f"hf://{tmp_path}/two:test")) == 3
    assert "cannot be loaded" in error_of(f"hf://{tmp_path}/two:absent").rule
    assert "has no column 'body'" in error_of(f"hf://{tmp_path}/one", text_key="body").rule
    source = open_source(MixSource(f"hf://{tmp_path}/one"), "data.path")
    assert 0 < len(list(source.sample(source.size // 10))) <= 60
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_bytes(lines(TEXTS[:3]))
    assert [text for _, text in documents(f"hf://{tmp_path}/files")] == TEXTS[:3]


def test_without_the_package_or_the_network_the_error_says_so(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = error_of("hf://no-such-owner/no-such-data")
    assert "cannot be loaded" in error.rule and "without a network" in error.cure
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "datasets" in error_of("hf://any").rule


def test_a_key_of_plain_text_is_refused(tmp_path):
    """So that lines of JSON under another name are not trained on as they stand."""
    (tmp_path / "a.json").write_bytes(lines(["one"], "body"))
    with pytest.raises(UserError, match="read as plain text") as caught:
        documents(tmp_path, text_key="body")
    assert caught.value.field == "data.text_key" and "data.format" in caught.value.cure
    assert documents(tmp_path, text_key="body", format=DataFormat.jsonl) == [("a.json:1", "one")]
    with pytest.raises(UserError, match="Python's standard library is read as plain text"):
        documents("", text_key="body")


def test_a_line_of_gzip_that_is_too_long_is_refused_before_it_takes_memory(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(400):
            stream.write(b"x" * (1 << 20))
    tracemalloc.start()
    try:
        error = error_of(path)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()
    assert "longer than 128 MiB" in error.rule
