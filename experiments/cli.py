"""How every command starts and ends: Hydra composes, the schema checks, and the exit code says what to do next.

- 0: done (running out of memory is a result too)
- 1: a cell failed, or the disk is full
- 2: the user's mistake, in one sentence; nothing was written
- 75: stopped by a signal, or another process has the cell; the same command goes on
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.attempt import Busy
from experiments.cell import note
from experiments.config import CONF, resolved
from experiments.files import Damaged, disk_is_full
from experiments.mistakes import ConfigError
from experiments.multirun import make_ready
from experiments.schema import Config
from experiments.signals import AGAIN, Interrupted, listen

MISTAKES = (ConfigError, Damaged, HydraException, OmegaConfBaseException, FileNotFoundError)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class Unsuccessful(Exception):
    """A command ended with an exit code other than 0. An exception so that Hydra's launchers see it too."""

    @property
    def code(self) -> int:
        return self.args[0]


def command(work: Callable[[Config], int], options: str | None = None) -> None:
    """Run `work` on the configuration that the command line asks for; exits with its code.

    options: the group of the configuration that is the command's own. Its fields may be set without the group's
    name: `rank=8` for `export.rank=8`.
    """
    if options:
        sys.argv[1:] = [with_group(argument, options) for argument in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    listen()
    make_ready(sys.argv)
    ended: list[Exception] = []

    @hydra.main(config_path=CONF, config_name="config", version_base="1.3")
    def run(cfg: DictConfig) -> None:
        try:
            if code := work(resolved(cfg)):
                raise Unsuccessful(code)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # its launcher may be in another process
                raise
            ended.append(error)  # Hydra would print the whole command line first

    try:
        run()
        for error in ended:
            raise error
    except Unsuccessful as error:
        sys.exit(error.code)
    except (Busy, Interrupted) as error:
        note(f"{error}; the same command goes on where this one was")
        sys.exit(AGAIN)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        note(f"error: {sentence(error)}")
        sys.exit(code)
    sys.exit(0)


def with_group(argument: str, group: str) -> str:
    """A command line's argument, with the group's name in front of it if it sets one of the group's fields."""
    return f"{group}.{argument}" if argument.split("=")[0] in vars(getattr(Config(), group)) else argument


def exit_code(error: Exception) -> int | None:
    """The exit code for an error that one sentence explains; None for any other."""
    if disk_is_full(error):
        return 1
    if isinstance(error, MISTAKES) or (isinstance(error, OSError) and error.errno in NOT_WRITABLE):
        return 2
    return None


def sentence(error: BaseException) -> str:
    """An error as one line; Hydra's with its cause and without its search path."""
    text = str(error).split("Config search path")[0]
    parts = [" ".join(text.split())]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        parts.append(str(error.__cause__).splitlines()[0])
    if disk_is_full(error):
        parts.append("free some space and run the same command again; nothing that was computed is lost")
    elif isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        parts.append("name a folder that can be written with outputs=FOLDER")
    return ": ".join(parts)


def verdict(record: dict) -> int:
    """The exit code for a record, with a line for the user if it tells of a failure."""
    if record["status"] == "failed":
        note(f"{record['name']} failed: {record['reason']}")
    return int(record["status"] == "failed")


def quiet() -> None:
    """Leave the terminal to our own lines and progress bars."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "lm_eval", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
