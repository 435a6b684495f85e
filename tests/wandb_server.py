"""A stand-in for the part of W&B's server that a dashboard needs: queries of who asks and of views, views saved."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def wandb_server() -> Iterator[tuple[str, dict[str, dict]]]:
    """The server's address, and the views saved so far: id -> the variables that it was saved with."""
    views: dict[str, dict] = {}

    def answer(query: str, variables: dict) -> dict:
        if "upsertView" in query:
            known = variables.get("id") or f"view-{len(views)}"
            views[known] = variables
            return {"upsertView": {"view": {"id": known}}}
        if "allViews" in query:
            found = [known for known, view in views.items() if view["name"] == variables["name"]]
            return {"project": {"allViews": {"edges": [{"node": {"id": known}} for known in found]}}}
        return {"viewer": {"id": "1", "entity": "someone"}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = json.dumps({"data": answer(body["query"], body.get("variables") or {})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", views
    finally:
        server.shutdown()
        server.server_close()
