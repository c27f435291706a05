"""A hub on the loopback interface, and scripts in processes of their own that are pointed at it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
"""The commit of every repository."""
ROOT = Path(__file__).parents[2]


def run_script(script: str, *arguments: str, home: Path, **env: str) -> str:
    """What a script prints in a fresh process: the endpoint and the cache are read when huggingface_hub is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"} | env
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Generator[tuple[str, list[str]]]:
    """Serve directories as repositories of models; yields the address and the files that were fetched, in order."""
    served: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            name = next((n for n in repositories if f"/{n}" in path), "")
            if not name:
                self.refuse("RepoNotFound")
                return
            base = repositories[name]
            files = sorted(p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file())
            if "/tree/" in path:
                entries = [{"type": "file", "path": f, "size": (base / f).stat().st_size} for f in files]
                self.reply(json.dumps([e | {"oid": "0" * 40} for e in entries]).encode(), body)
            elif path.startswith("/api/models/"):
                info = {"id": name, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
                self.reply(json.dumps(info).encode(), body)
            else:
                file = re.sub(rf"^/{name}/resolve/[^/]+/", "", path)
                if file not in files:
                    self.refuse("EntryNotFound")
                    return
                if body:
                    served.append(file)
                self.reply((base / file).read_bytes(), body)

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", SHA)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def reply(self, content: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
