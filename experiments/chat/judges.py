"""Judges: an OpenAI-compatible endpoint, or a model on this machine. Both turn chat messages into a reply."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import openai
import torch

from experiments.mistakes import ConfigError
from experiments.schema import JudgeSettings
from qdylora import compute_dtype, load_base, load_tokenizer


@dataclass(frozen=True)
class Reply:
    """text, and the tokens it took if the judge counts them."""

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None


class Refused(RuntimeError):
    """The judge will not answer this request, however often it is asked (too long, or against its rules)."""


class Unreachable(RuntimeError):
    """The judge does not answer any more, or not to us: there is no point in going on now."""


class Endpoint:
    """A server that speaks OpenAI's chat completions. The client retries time-outs, lost connections, 429 and 5xx with
    growing waits (or as the server's Retry-After says).

    The key is read from the environment and given to the client; it is in no message and no record.
    """

    def __init__(self, settings: JudgeSettings):
        self.settings = settings
        self.client = openai.OpenAI(
            base_url=settings.address,
            api_key=api_key(settings),
            timeout=settings.timeout,
            max_retries=settings.retries,
        )

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Raises Refused or Unreachable."""
        s = self.settings
        try:
            done = self.client.chat.completions.create(
                model=s.model, messages=messages, temperature=s.temperature, max_tokens=s.max_tokens
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise Refused(f"the server answered {error.status_code}") from None
        except openai.APIStatusError as error:  # its text may repeat the key
            raise Unreachable(f"{s.address} answered {error.status_code}{_hint(error.status_code, s)}") from None
        except openai.APITimeoutError:
            raise Unreachable(f"{s.address} did not answer within {s.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Unreachable(f"{s.address}: {type(error.__cause__ or error).__name__}") from None
        usage = done.usage
        text = done.choices[0].message.content or "" if done.choices else ""
        return Reply(text, usage and usage.prompt_tokens, usage and usage.completion_tokens)


def api_key(settings: JudgeSettings) -> str:
    """The key from the environment; a server on this machine needs none. ConfigError if there is none."""
    key = os.environ.get(settings.key)
    if key:
        return key
    if urlsplit(settings.address).hostname in ("localhost", "127.0.0.1", "::1"):
        return "none"
    raise ConfigError(
        f"judge.key is {settings.key!r}, but there is no such environment variable; export it with your key, or set "
        "judge.address to a server on this machine"
    )


def _hint(status: int, settings: JudgeSettings) -> str:
    if status in (401, 403):
        return f"; check the key in the environment variable {settings.key}"
    return f"; check judge.address and judge.model ({settings.model})" if status == 404 else ""


class Local:
    """A chat model on this machine, one reply at a time."""

    def __init__(self, settings: JudgeSettings, cache: Path):
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model, cache=cache)
        if not self.tokenizer.chat_template:
            raise ConfigError(f"judge.model is {settings.model!r}, which has no chat template; choose a chat model")
        self.model = load_base(settings.model, 16, compute_dtype("auto", 16), cache=cache).eval()

    @torch.no_grad()
    def ask(self, messages: list[dict[str, str]]) -> Reply:
        s = self.settings
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        start = ids["input_ids"].shape[1]
        sampling = {"do_sample": True, "temperature": s.temperature} if s.temperature else {"do_sample": False}
        done = self.model.generate(
            **ids, max_new_tokens=s.max_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
        )
        new = done[0, start:]
        return Reply(self.tokenizer.decode(new, skip_special_tokens=True), start, len(new))
