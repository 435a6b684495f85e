"""A server that answers OpenAI's chat completions as a test wants it to, with faults; and files of answers to judge."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Plan:
    """What to do with a request: wait, then answer with a status, or with a reply."""

    reply: str = "1"
    status: int = 200
    seconds: float = 0
    body: str = "no"


@dataclass
class JudgeServer:
    """decide(number of the request, its user message) -> Plan. answered: user messages that got a reply, counted."""

    decide: Callable[[int, str], Plan]
    port: int = 0
    answered: Counter = field(default_factory=Counter)
    requests: int = 0

    def __enter__(self) -> JudgeServer:
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                user = body["messages"][-1]["content"]
                with lock:
                    number, outer.requests = outer.requests, outer.requests + 1
                plan = outer.decide(number, user)
                time.sleep(plan.seconds)
                if plan.status == 200:
                    with lock:
                        outer.answered[user] += 1
                    message = {"role": "assistant", "content": plan.reply}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
                    text = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
                    self._send(200, json.dumps(text | {"choices": [choice], "usage": usage}))
                else:
                    self._send(plan.status, json.dumps({"error": {"message": plan.body}}), {"Retry-After": "0"})

            def _send(self, status: int, text: str, headers: dict[str, str] | None = None):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request, client_address):
                pass  # a client that gave up waiting

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __exit__(self, *error) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def write_answers(folder: Path, contestants: str = "ab", prompts: int = 4) -> list[str]:
    """Prompts and a file of answers for each contestant in `folder`; returns the overrides that name them."""
    rows = [{"question_id": i, "text": f"Question {i}?"} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["scale=smoke", "tournament=files", f"tournament.prompts={folder}/prompts.jsonl"]
    for name in contestants:
        answers = [{"question_id": row["question_id"], "text": f"answer {name} to {row['text']}"} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        overrides.append(f"+tournament.contestants.{name}.answers={folder}/{name}.jsonl")
    return [*overrides, f"outputs={folder}/outputs"]
