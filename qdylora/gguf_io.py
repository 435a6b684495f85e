"""Write GGUF files: copies of others with some of their fields left out and some of their tensors changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np

ARCHITECTURE = "general.architecture"


def copy_gguf(
    source: gguf.GGUFReader,
    target: Path,
    *,
    without: Collection[str] = (),
    fields: Mapping[str, int] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write `source` to the file `target`: fields named in `without` left out, those in `fields` with another number,
    and the tensors named in `tensors` in place of its own; all else as it is, bit by bit."""
    fields, tensors = fields or {}, tensors or {}
    writer = gguf.GGUFWriter(target, source.fields[ARCHITECTURE].contents())
    for name, field in source.fields.items():
        if name not in without and name != ARCHITECTURE and not name.startswith("GGUF."):
            value = fields.get(name, field.contents())
            writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1])
    for tensor in source.tensors:
        if tensor.name in tensors:
            writer.add_tensor(tensor.name, tensors[tensor.name])
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that `writer` was given to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
