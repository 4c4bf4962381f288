"""Tables of contents that a library unpickles: which are let through, and which are not."""

import pickle
from pathlib import PosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from dovetail.trainers.megatron.reading import check_table
from dovetail.types.errors import CheckpointError

OK = b"torch\nSize\n"
"""Of a name that is allowed."""


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


HOSTILE = {
    "GLOBAL": b"cposix\nsystem\n(S'true'\ntR.",
    "STACK_GLOBAL": b"\x80\x04" + text("posix") + text("system") + b"\x93.",
    "strings of protocol 0": b"\x80\x04S'posix'\nS'system'\n\x93.",
    "BINSTRING": b"\x80\x04T\x05\x00\x00\x00posixT\x06\x00\x00\x00system\x93.",
    "SHORT_BINSTRING": b"\x80\x04U\x05posixU\x06system\x93.",
    "allowed strings, then others that are not looked at": (
        b"\x80\x04" + text("torch") + text("Size") + b"U\x05posixU\x06system\x93."
    ),
    "POP_MARK": (
        b"\x80\x04"
        + text("posix")
        + text("system")
        + b"("
        + text("torch")
        + text("Size")
        + b"1\x93."
    ),
    "POP": b"\x80\x04" + text("posix") + text("system") + text("Size") + b"0\x93.",
    "DUP": b"\x80\x04" + text("posix") + b"2\x93.",
    "memo of what is no string": (
        b"\x80\x04" + text("torch") + b"\x94c" + OK + b"\x94" + b"h\x00h\x01\x93."
    ),
    "memo that is written anew": (
        b"\x80\x04"
        + text("torch")
        + b"q\x00"
        + text("posix")
        + b"q\x00"
        + text("system")
        + b"\x93."
    ),
    "one string only": b"\x80\x04" + text("Size") + b"\x93.",
    "something between": b"\x80\x04" + text("torch") + b"N" + text("Size") + b"\x93.",
    "a name below an allowed module": b"\x80\x04" + text("torch") + text("load") + b"\x93.",
    "attributes of an allowed name": b"\x80\x04" + text("torch") + text("Size.count") + b"\x93.",
    "INST": b"\x80\x02(iposix\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02Pname\n.",
    "cut": b"\x80\x04" + text("torch"),
    "empty": b"",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_could_import_anything_else_is_refused(case, tmp_path):
    file = tmp_path / ".metadata"
    file.write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        check_table(file)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tables_of_every_binary_protocol_are_let_through(protocol, tmp_path):
    dcp.save(
        {"a": torch.ones(3, 4), "b": {"c": torch.ones(2, dtype=torch.bfloat16)}, "d": 3},
        checkpoint_id=tmp_path / "made",
        no_dist=True,
    )
    made = tmp_path / "made" / ".metadata"
    check_table(made)
    table = pickle.loads(made.read_bytes())
    index = MetadataIndex("big", torch.Size([1 << 40, 300, 70000]), 5)
    table.storage_data[index] = [PosixPath("a" * 300), None, True, 1.5]
    again = tmp_path / ".metadata"
    again.write_bytes(pickle.dumps(table, protocol=protocol))
    check_table(again)
    assert isinstance(table, Metadata)
