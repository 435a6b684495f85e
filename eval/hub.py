"""What to say when something is neither in the Hugging Face cache nor to be had from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fetched(name: str) -> Iterator[None]:
    """Inside this context `name` is read from the hub or its cache. FileNotFoundError, with the remedy, if it is
    in neither."""
    try:
        yield
    except OSError as error:  # no network, no such repository, no access: huggingface_hub's errors are all OSErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name} could not be had from the Hugging Face hub ({reason}); "
            "on a machine with internet, fetch what a table needs with `make prefetch`"
        ) from error
