"""The task list of an array: which cell is which task, in a JSON file under the output folder.

    outputs/slurm/table1-paper-20261123-081500.json

A list holds overrides of cells and nothing that could lead out of the output folder it lies in.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from experiments.files import Damaged, read_json, write_json

FOLDER = "slurm"
KEYS_OF_PLACES = ("outputs", "hydra")


@dataclass(frozen=True)
class Task:
    """A cell's name and its command-line overrides."""

    name: str
    overrides: list[str]


@dataclass(frozen=True)
class TaskList:
    """job: the array's id, None until it is submitted. processes: of one cell, on all its nodes."""

    file: Path
    tasks: list[Task]
    processes: int
    job: str | None = None

    @property
    def outputs(self) -> Path:
        return self.file.parent.parent

    @property
    def logs(self) -> Path:
        return self.file.with_suffix("")

    def command(self, index: int) -> list[str]:
        """Overrides of one task, with the output folder last: whatever the list says, results go there.

        Damaged if the list has no such task or a task that names a place.
        """
        if not 0 <= index < len(self.tasks):
            raise Damaged(f"{self.file} has tasks 0 to {len(self.tasks) - 1}, not {index}")
        overrides = self.tasks[index].overrides
        for override in overrides:
            if is_a_place(override):
                raise Damaged(f"{self.file}: task {index} has {override!r}; a task list may not name output folders")
        return [*overrides, f"outputs={quoted(str(self.outputs))}"]

    def submitted(self, job: str) -> TaskList:
        """Write the array's id into the list."""
        done = replace(self, job=job)
        done.write()
        return done

    def remove(self) -> None:
        """Of an array that was not submitted."""
        self.file.unlink()
        self.logs.rmdir()

    def write(self) -> None:
        write_json(self.file, {key: value for key, value in asdict(self).items() if key != "file"})

    @classmethod
    def read(cls, file: Path) -> TaskList:
        """Damaged, or FileNotFoundError, if `file` is no list as written here."""
        content = read_json(file)
        if content is None:
            raise FileNotFoundError(f"no task list at {file}")
        try:
            return cls(file, [Task(**task) for task in content.pop("tasks")], **content)
        except (KeyError, TypeError) as error:
            raise Damaged(f"{file} is no task list ({error})") from error

    @classmethod
    def new(cls, outputs: Path, title: str, tasks: list[Task], processes: int) -> TaskList:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        made = cls(outputs.resolve() / FOLDER / f"{title}-{stamp}.json", tasks, processes)
        made.write()
        return made


def is_a_place(override: str) -> bool:
    key = override.split("=", 1)[0].strip().lstrip("+~").split("@")[0]
    return key.split(".")[0].split("/")[0] in KEYS_OF_PLACES


def quoted(text: str) -> str:
    """`text` as a value of a Hydra override, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'") if "'" in text or text.endswith("\\") else text
    return f"'{escaped}'"
