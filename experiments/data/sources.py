"""One way to a data set: from the hub, from local files in the original release formats, or generated.

    loaded = load("gsm8k", "local", root=Path("data"), evaluation=evaluation_questions(Path("data")))

Whatever the source, the rows pass through the same functions, and the report says what became of each of
them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.hub import fetched
from eval.releases import (
    CARVED,
    FILES,
    RowErrors,
    carve,
    hold_out,
    normalized,
    paths,
    read_jsonl,
    require,
    rows,
    sha256,
)
from experiments.data.formats import FORMATS, Example, oasst1_trees
from experiments.data.overlap import count

SOURCES = ("hub", "local", "generated")
HELD_OUT = 1024  # QLoRA's eval_dataset_size

MESSAGE_FIELDS = ("message_id", "parent_id", "text", "role", "rank", "deleted")

# The instruction sets' files under a release folder; the three tasks are read by eval.releases.
LOCAL = {
    "alpaca": "alpaca/*.json",
    "oasst1": "oasst1/*.jsonl",
    "self_instruct": "self_instruct/seed_tasks.jsonl",
    "flan_v2": "flan_v2/cot_data/*.tsv",
}


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face hub: id (or a local clone of it), configuration, revision and split."""

    id: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Loaded:
    """Examples to train on, examples held out for the loss, and a JSON-able report of their origin."""

    train: list[Example]
    held_out: list[Example]
    report: dict


def load(
    name: str,
    source: str,
    *,
    root: Path | None = None,
    hub: HubSet | None = None,
    seed: int = 0,
    held_out: int = HELD_OUT,
    evaluation: Mapping[str, Iterable[str]] | None = None,
) -> Loaded:
    """Return the examples of a data set.

    `root` is the release folder of a local source or the folder generated data are kept in, `hub` names a hub
    set. `held_out` questions, at most a tenth, are chosen by `seed` and the hash of their text. `evaluation`
    maps names of evaluation sets to their questions (see `overlap.evaluation_questions`); training rows equal
    to one are counted, not dropped. Rows that validate the rank (`eval.releases.carve`) are never among the
    examples.

    Raises ValueError for an unknown name or source or too many malformed rows, FileNotFoundError for missing
    files.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(FORMATS)}")
    errors = RowErrors()
    if source == "hub":
        found, origin = _from_hub(name, hub, errors)
    else:
        found, origin = _from_files(name, release_root(source, root, seed), errors)
    errors.check()
    answered = [example for example in found if example.completion.strip()]
    examples = list(dict.fromkeys(answered))
    asked = {example: normalized(example.question) for example in examples}
    limit = min(held_out, len(set(asked.values())) // 10)
    train, held = hold_out(examples, asked.get, limit, salt=f"held out, seed {seed}")
    report = {
        "name": name,
        "source": source,
        **origin,
        "unparsed": {"count": len(errors.bad), "first": errors.bad[:5]},
        "empty_answers": len(found) - len(answered),
        "duplicates": len(answered) - len(examples),
        "train": len(train),
        "held_out": len(held),
        "overlap": count((example.question for example in train), evaluation or {}),
    }
    return Loaded(train, held, report)


def release_root(source: str, root: Path | None, seed: int) -> Path:
    """Return the release folder of a local or generated source, generating it if need be."""
    if source not in SOURCES or source == "hub":
        raise ValueError(f"source {source!r} has no release folder; use one of {', '.join(SOURCES)}")
    if root is None:
        raise ValueError(f"source {source!r} needs a root folder")
    return Path(root) if source == "local" else generated(Path(root), seed)


def generated(parent: Path, seed: int) -> Path:
    """Return the folder of generated data of this seed under `parent`, building it once.

    It is built beside its place and moved there when complete, so a killed build leaves nothing half-made.
    Raises ValueError if the files are not those its manifest lists.
    """
    from experiments.data import facts  # its packages are slow to import, and only this source needs them

    folder = parent / f"facts-v{facts.VERSION}-seed{seed}"
    if not folder.exists():
        parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
        workshop.chmod(0o755)
        try:
            facts.build(workshop, seed)
            _write_manifest(workshop)
            os.rename(workshop, folder)
        except OSError:
            if not folder.exists():  # if it does, another process has built the same bytes meanwhile
                raise
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    _check_manifest(folder)
    return folder


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _write_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps(_checksums(folder), indent=1) + "\n")


def _check_manifest(folder: Path) -> None:
    listed, found = json.loads(require(folder / "manifest.json").read_text()), _checksums(folder)
    changed = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{folder}: {changed[0]} is not as generated; remove the folder to have it made anew")


def _from_hub(name: str, hub: HubSet | None, errors: RowErrors) -> tuple[list[Example], dict]:
    from datasets import load_dataset  # slow to import, and only this source needs it

    if hub is None:
        raise ValueError(f"source 'hub' needs the id of {name} on the hub")
    with fetched(hub.id):
        data = load_dataset(hub.id, hub.config, revision=hub.revision, split=hub.split)
    kept = carve(list(data))[0] if name in CARVED else data
    parsed = (errors.parse(f"{hub.id}[{hub.split}]:{n}", FORMATS[name], row) for n, row in enumerate(kept, 1))
    found = [example for examples in parsed for example in examples or ()]
    origin = {
        "hub": asdict(hub),
        "fingerprint": data._fingerprint,
        "rows": len(data),
        "kept_for_validation": len(data) - len(kept),
    }
    return found, origin


def _from_files(name: str, folder: Path, errors: RowErrors) -> tuple[list[Example], dict]:
    if name in FILES:
        files = paths(name, "train", folder)
        kept = rows(name, "train", folder, errors)
        parsed = [FORMATS[name](row) for row in kept]
        for_validation = errors.rows - len(errors.bad) - len(kept)
    else:
        files = sorted(folder.glob(LOCAL[name])) or [require(folder / LOCAL[name])]
        parsed = [examples for path in files for examples in READERS[path.suffix](name, path, errors)]
        for_validation = 0
    found = [example for examples in parsed for example in examples]
    origin = {
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
        "rows": errors.rows,
        "kept_for_validation": for_validation,
    }
    return found, origin


def _json_array(name: str, path: Path, errors: RowErrors) -> Iterator[list[Example]]:
    try:
        records = json.loads(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError("not a list of records")
    except ValueError as error:
        errors.note(f"{path}", error)
        return
    for number, record in enumerate(records, start=1):
        examples = errors.parse(f"{path}:record {number}", FORMATS[name], record)
        if examples is not None:
            yield examples


def _json_lines(name: str, path: Path, errors: RowErrors) -> Iterator[list[Example]]:
    # A message tree is a row spread over lines of its own: its messages are collected first.
    messages = []

    def parse(row: dict) -> list[Example]:
        if "message_tree_id" not in row:
            return FORMATS[name](row)
        messages.append({key: row[key] for key in MESSAGE_FIELDS})
        return []

    yield from read_jsonl(path, parse, errors)
    yield from (FORMATS[name](row) for row in oasst1_trees(messages))


def _cot_table(name: str, path: Path, errors: RowErrors) -> Iterator[list[Example]]:
    def parse(line: bytes) -> list[Example]:
        columns = line.decode().rstrip("\n").replace("\\n", "\n").split("\t")
        question, answer, chain = columns
        return FORMATS[name]({"question": question, "answer": answer, "chain_of_thought": chain})

    with open(path, "rb") as file:  # binary: only "\n" ends a line
        for number, line in enumerate(file, start=1):
            examples = errors.parse(f"{path}:{number}", parse, line)
            if examples is not None:
                yield examples


READERS = {".json": _json_array, ".jsonl": _json_lines, ".tsv": _cot_table}
