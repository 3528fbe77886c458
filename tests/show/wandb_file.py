"""Reads a .wandb file back: LevelDB log format (7-byte file header, 32 KiB blocks, records of <crc u32, length u16, type u8>)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FULL, LAST = 32768, 1, 4


def records(path: Path) -> Iterator[Any]:
    """Whole protobuf records; the torn tail of a killed run is left out."""
    from wandb.proto import wandb_internal_pb2

    data, position, body = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        if kind == 0 or len(piece) < length:
            return
        position += 7 + length
        body += piece
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            body = b""
            yield record


def run_records(run_folder: Path) -> list[Any]:
    """All records of the attempts of a run folder, in the order of their start."""
    return [record for path in sorted(run_folder.glob("wandb/*run-*/run-*.wandb")) for record in records(path)]


def history(run_folder: Path) -> list[dict[str, Any]]:
    """What the attempts of a run folder logged, in the order of their start."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in run_records(run_folder)
        if record.WhichOneof("record_type") == "history"
    ]
