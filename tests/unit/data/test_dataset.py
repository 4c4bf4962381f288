import json
import sys

import pytest

from dovetail.data.dataset import load_rows
from dovetail.types.errors import DataError, MissingExtraError


def write_jsonl(path, num_rows):
    path.write_text("".join(json.dumps({"input": f"q{i}"}) + "\n" for i in range(num_rows)))
    return path


def inputs(spec):
    return [row.values["input"] for row in load_rows(str(spec))]


def test_jsonl_rows_come_in_order_and_know_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "x"}\n\n   \n{"input": "y"}\n')
    rows = load_rows(str(path))
    assert [row.values["input"] for row in rows] == ["x", "y"]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ("0:2", [0, 1]),
        (":3", [0, 1, 2]),
        ("7:", [7, 8, 9]),
        (":", list(range(10))),
        ("-3:", [7, 8, 9]),
        (":-8", [0, 1]),
        ("-4:-2", [6, 7]),
        ("2:-7", [2]),
        ("8:99", [8, 9]),
    ],
)
def test_slices_mean_what_they_mean_in_python(tmp_path, bounds, expected):
    path = write_jsonl(tmp_path / "a.jsonl", 10)
    assert inputs(f"{path}@[{bounds}]") == [f"q{i}" for i in expected]


def test_a_malformed_line_outside_of_the_slice_is_not_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "x"}\n{broken\n')
    assert inputs(f"{path}@[0:1]") == ["x"]


@pytest.mark.parametrize(
    "spec", ["a.jsonl@[1:2:3]", "a.jsonl@[x]", "a.jsonl@[-:3]", "a.jsonl@[1:2"]
)
def test_a_slice_that_can_not_be_read_says_how_to_write_one(spec):
    with pytest.raises(DataError, match=r"path@\[a:b\]"):
        load_rows(spec)


def test_an_empty_slice_says_how_many_rows_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", 3)
    with pytest.raises(DataError, match="has 3 rows"):
        load_rows(f"{path}@[5:9]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "not JSON"),
        (b'{"input": NaN}', "NaN is not JSON"),
        (b"[1, 2]", "a row is an object .* got a list"),
        (b'"text"', "got a string"),
        (b'{"input": "\xff"}', "not UTF-8"),
        (b'{"input": "\\ud800"}', "surrogate"),
        (b"[" * 200_000, "not usable JSON|not JSON"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"input": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(path))
    assert f"{path}:2" in str(caught.value)


def test_large_integers_keep_every_digit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"label": 123456789012345678901234567890}\n')
    assert load_rows(str(path))[0].values["label"] == 123456789012345678901234567890


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "x"}\n')
    assert inputs(path) == ["x"]


def test_a_json_file_is_a_list_of_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"input": "x"}, {"input": "y"}]')
    assert inputs(path) == ["x", "y"]
    path.write_text('{"input": "x"}')
    with pytest.raises(DataError, match="a list of objects, got an object"):
        load_rows(str(path))
    path.write_text('[{"input": "x"}, 3]')
    with pytest.raises(DataError, match="item 1"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing"])
def test_a_missing_file_is_named_with_the_flag(tmp_path, name):
    with pytest.raises(DataError, match="--prompt-data"):
        load_rows(str(tmp_path / name))


def test_an_empty_file_and_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("input\nx\n")
    with pytest.raises(DataError, match=r"'\.csv'; expected \.jsonl"):
        load_rows(str(tmp_path / "a.csv"))


def test_parquet_rows_are_read_over_batches_and_sliced(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pa.table(
        {"input": [f"q{i}" for i in range(2500)], "metadata": [{"i": i} for i in range(2500)]}
    )
    pq.write_table(table, path)
    rows = load_rows(f"{path}@[-2:]")
    assert [row.values for row in rows] == [
        {"input": f"q{i}", "metadata": {"i": i}} for i in (2498, 2499)
    ]
    assert rows[0].where == f"{path} row 2498"


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet"):
        load_rows(str(path))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"dovetail-rl\[data\]"):
        load_rows(str(path))


def test_saved_datasets_are_read_and_several_splits_must_be_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"input": "x"}, {"input": "y"}])
    one.save_to_disk(str(tmp_path / "one"))
    assert inputs(f"{tmp_path / 'one'}@[1:]") == ["y"]
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "single"))
    assert inputs(tmp_path / "single") == ["x", "y"]
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match="two/train"):
        load_rows(str(tmp_path / "two"))
    assert inputs(tmp_path / "two" / "test") == ["x", "y"]


def test_a_folder_is_its_files_in_name_order(tmp_path):
    write_jsonl(tmp_path / "train-1.jsonl", 2)
    (tmp_path / "train-0.jsonl").write_text('{"input": "first"}\n')
    (tmp_path / "info.json").write_text('{"license": "none"}')
    assert inputs(tmp_path) == ["first", "q0", "q1"]


def test_a_folder_of_several_splits_or_of_nothing_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="it has the folders data"):
        load_rows(str(tmp_path))
    write_jsonl(tmp_path / "train-0.jsonl", 1)
    write_jsonl(tmp_path / "test-0.jsonl", 1)
    with pytest.raises(DataError, match="splits test, train"):
        load_rows(str(tmp_path))
