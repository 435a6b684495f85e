"""The page for human raters of a tournament:  python -m experiments.rate data=oasst1 method=qdylora tournament=ranks

Two answers at a time, in random order, without names. Raters open the file in a browser and save theirs; put what they
saved into outputs/<scale>/tournament/<name>/human/ and run experiments.tournament again.
"""

from __future__ import annotations

from experiments.cell import Cell, note
from experiments.chat.page import sample, write_page
from experiments.cli import command, quiet
from experiments.mistakes import ConfigError
from experiments.schema import Config
from experiments.tournament import folder, matches


def main(config: Config) -> None:
    quiet()
    chosen = sample(matches(Cell(config)), config.tournament.human_matches, config.seed)
    if not chosen:
        raise ConfigError("tournament.contestants gave the same answer to every prompt; there is nothing to rate")
    here = folder(config)
    print(write_page(here, chosen, "Which answer is better?"))
    note(f"{len(chosen)} pairs; put the saved files into {here / 'human'} and run experiments.tournament again")


if __name__ == "__main__":
    command(main)
