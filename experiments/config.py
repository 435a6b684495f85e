"""The configuration of a command: composed by Hydra from `conf/`, held to the schema, its values checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.checks import check
from experiments.mistakes import ConfigError
from experiments.schema import Config, Contestant

CONF = str(Path(__file__).resolve().parents[1] / "conf")

#: Keys that change where or how fast a cell runs, not what it computes.
INCIDENTAL = (
    "table",
    "cluster",
    "samples",
    "export",
    "generate",
    "pick",
    "tournament",
    "judge",
    "tracker",
    "forecast",
    "outputs",
    "root",
    "checkpoint_every",
    "when_busy",
)
INCIDENTAL_TASKS = ("tokens_per_batch", "dequantize")


def resolved(cfg: DictConfig) -> Config:
    """The configuration as checked dataclasses. Raises ConfigError."""
    try:
        # Merging plain values into the schema refuses what Hydra lets pass: a key added with +.
        plain = OmegaConf.to_container(cfg, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error.msg or error).splitlines()[0]}") from error
    config.tournament.contestants = {
        name: _contestant(name, fields) for name, fields in config.tournament.contestants.items()
    }
    check(config)
    return config


def _contestant(name: str, fields: Any) -> Contestant:
    """Checked here because Hydra cannot add an entry of a dataclass type from the command line."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Contestant), fields or {}))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"tournament.contestants.{name}: {str(error).splitlines()[0]}") from error


def substance(cfg: dict) -> dict:
    """The part of a resolved configuration (plain dicts) that decides a cell's results."""
    kept = {key: value for key, value in cfg.items() if key not in INCIDENTAL}
    kept["model"] = {key: value for key, value in cfg["model"].items() if key != "architecture"}
    kept["tasks"] = {key: value for key, value in cfg["tasks"].items() if key not in INCIDENTAL_TASKS}
    if kept["data"].get("rows") is None:  # as in records from before there was this key, which stay valid
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "rows"}
    if not cfg["method"]["draw"].get("after"):  # likewise
        draw = {key: value for key, value in cfg["method"]["draw"].items() if key != "after"}
        kept["method"] = cfg["method"] | {"draw": draw}
    return kept
