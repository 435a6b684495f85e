"""Read a run that W&B wrote offline. Its own reader is inside its binary; the format is LevelDB's log of protobufs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record, RunRecord

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")  # checksum, length, type
FIRST = 7  # bytes of the file's own header
WHOLE, LAST = 1, 4  # types of a record's only and of its last part


@dataclass
class OfflineRun:
    """run: its identity. history: one dict a step. axes: glob of series -> the series they are drawn over.
    charts: keys of custom charts. ended: whether the run was brought to its end."""

    run: RunRecord = field(default_factory=RunRecord)
    history: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    charts: set[str] = field(default_factory=set)
    artifacts: list[ArtifactRecord] = field(default_factory=list)
    ended: bool = False


def read_run(file: Path) -> OfflineRun:
    found = OfflineRun()
    for record in _records(file.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
            case "history":
                found.history.append(_items(record.history.item))
            case "summary":
                found.summary |= _items(record.summary.update)
            case "metric" if record.metric.glob_name:
                found.axes[record.metric.glob_name] = record.metric.step_metric
            case "config":
                found.charts |= {u.nested_key[2] for u in record.config.update if "visualize" in u.nested_key}
            case "artifact":
                found.artifacts.append(record.artifact)
            case "exit":
                found.ended = True
    return found


def _items(items) -> dict:
    """Values by key; a value of several parts (a table, a histogram) as a dict."""
    found: dict = {}
    for item in items:
        *parents, key = item.nested_key or [item.key]
        inner = found
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = json.loads(item.value_json)
    return found


def _records(data: bytes) -> Iterator[Record]:
    at, parts = FIRST, b""
    while at + HEADER.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:  # too little for a header is padding
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        end = at + HEADER.size + length
        if end > len(data):  # the rest is still to be written
            return
        parts += data[at + HEADER.size : end]
        at = end
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)
            parts = b""
