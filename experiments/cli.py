"""How every command starts: Hydra composes, the schema checks, and a user's mistake is one sentence, exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config import CONF, Config, ConfigError, resolved

# Weights of a few hundred MB come and go with every quantized forward pass: keep them mapped.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def command(work: Callable[[Config], int | None]) -> None:
    """Run `work` on the configuration that the command line asks for; exits with its code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    codes: list[int] = []

    @hydra.main(config_path=CONF, config_name="config", version_base="1.3")
    def run(cfg: DictConfig) -> None:
        with _mistakes_in_one_sentence():  # here too, since Hydra has words of its own for what leaves this function
            codes.append(work(resolved(cfg)) or 0)

    with _mistakes_in_one_sentence():
        run()
    sys.exit(max(codes, default=0))


@contextmanager
def _mistakes_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException, FileNotFoundError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)


def sentence(error: BaseException) -> str:
    """An error as one line; Hydra's with its cause and without its search path."""
    text = str(error).split("Config search path")[0]
    parts = [" ".join(text.split())]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        parts.append(str(error.__cause__).splitlines()[0])
    return ": ".join(parts)


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
