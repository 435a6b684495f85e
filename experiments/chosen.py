"""Which cell a command that uses an adapter works on: the one that the overrides describe, as in every command, or the
one in the folder that `cell=FOLDER` names, with the configuration it was run with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from experiments.cell import Cell, differences
from experiments.config import resolved, substance
from experiments.files import read_json
from experiments.mistakes import ConfigError
from experiments.schema import Config


def chosen(config: Config, group: str) -> Cell:
    """The cell that the command works on; `group` holds the command's own options, with its `cell`.

    ConfigError if the named folder holds no cell, or the described one was run with another configuration.
    """
    cell = Cell(config, at=folder(config, group))
    marker = read_json(cell.folder / "config.json")
    if getattr(config, group).cell:
        if marker is None:
            raise ConfigError(f"cell is {str(cell.folder)!r}, which holds no cell (no config.json); name its folder")
        plain = asdict(config) | marker["config"]
        return Cell(resolved(OmegaConf.create(plain)), at=cell.folder)
    if marker and marker["digest"] != cell.digest:
        changed = ", ".join(sorted(differences(marker["config"], substance(cell.plain_config))))
        raise ConfigError(
            f"{cell.folder} was run with another configuration ({changed} differs); "
            f"repeat its overrides, or name it with cell={cell.folder}"
        )
    return cell


def folder(config: Config, group: str) -> Path:
    """The folder of the cell. ConfigError if it is named and overrides describe another one beside it."""
    named = getattr(config, group).cell
    if named is None:
        return Cell(config).folder
    own = (f"{group}.", "outputs=")
    if others := [text for text in HydraConfig.get().overrides.task if not text.startswith(own)]:
        raise ConfigError(f"cell is {named!r}, and its configuration lies there; leave out {' '.join(others)}")
    return Path(named)
