"""The smallest rank that is good enough, from a finished cell:  python -m experiments.pick cell=FOLDER within=1%

Reads the cell's record only; a cell may also be described by overrides, as in every command.
"""

from __future__ import annotations

from analysis.layout import to_markdown
from analysis.pick import Distance, pick, sentence, table
from experiments.chosen import scores
from experiments.cli import command
from experiments.mistakes import mistakes_in
from experiments.schema import Config

OPTIONS = "pick"


def main(config: Config) -> None:
    with mistakes_in("pick"):
        picked = pick(scores(config, OPTIONS), Distance.parse(config.pick.within), config.pick.on)
    print(f"{sentence(picked)}\n\n{to_markdown(table(picked))}")


if __name__ == "__main__":
    command(main, OPTIONS)
