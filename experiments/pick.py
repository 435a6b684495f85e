"""The smallest rank that is good enough, from a finished cell:  python -m experiments.pick cell=FOLDER within=1%

Reads the cell's record only; a cell may also be described by overrides, as in every command.
"""

from __future__ import annotations

from analysis.layout import to_markdown
from analysis.pick import Distance, pick, sentence, table
from analysis.records import Record
from analysis.records import read as read_record
from experiments.chosen import folder
from experiments.cli import command
from experiments.mistakes import ConfigError, mistakes_in
from experiments.schema import Config
from qdylora.cut import AS_TRAINED

OPTIONS = "pick"


def scored(config: Config, group: str) -> Record:
    """The record of the cell that the command works on, with its adapter cut as asked. ConfigError unless it has been
    scored so."""
    here = folder(config, group)
    if not (here / "record.json").is_file():
        raise ConfigError(f"{here} has no record.json: its adapter has not been scored; run experiments.run first")
    with mistakes_in(f"the record of {here.name}"):
        record = read_record(here / "record.json")
    if not record.done:
        raise ConfigError(f"{record.name} has no scores: it ended with status {record.raw['status']}; run it again")
    cut = getattr(config, group).cut
    if (found := as_cut(record, cut)) is None:
        cuts = ", ".join([AS_TRAINED, *record.cuts])
        raise ConfigError(f"{group}.cut is {cut!r}, in which {record.name} was not scored; choose one of {cuts}")
    return found


def as_cut(record: Record, cut: str) -> Record | None:
    """The record's results with the adapter cut in this way; None if it was not scored so."""
    if cut == AS_TRAINED:
        return record
    return record.cut(cut) if cut in record.cuts else None


def main(config: Config) -> None:
    with mistakes_in("pick"):
        picked = pick(scored(config, OPTIONS), Distance.parse(config.pick.within), config.pick.on)
    print(f"{sentence(picked)}\n\n{to_markdown(table(picked))}")


if __name__ == "__main__":
    command(main, OPTIONS)
