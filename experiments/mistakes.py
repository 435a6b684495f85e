"""A user's mistakes, told by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from experiments.files import Damaged, disk_is_full


class ConfigError(ValueError):
    """A bad value in the configuration: one sentence that names the field, the value and the way out."""


@contextmanager
def mistakes_in(what: str) -> Iterator[None]:
    """Around the reading of what a user names: a complaint about it becomes a ConfigError that says what was read."""
    try:
        yield
    except (ConfigError, Damaged, FileNotFoundError):
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        if disk_is_full(error):
            raise
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error
