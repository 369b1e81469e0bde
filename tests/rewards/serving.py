"""A real server on this host that speaks as an OpenAI-compatible endpoint does, or fails as one does."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DRIPS = ("drip", "drip headers", "drip error")


class Server:
    """Says in turn what `script` holds, a function of the request or a status, then forever the last of it."""

    def __init__(self, *script):
        self.script, self.asked, self.times = list(script), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, dict(self.headers), body))
                outer.times.append(time.monotonic())
                act = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if act == "hang up":
                    return
                if act == "hang":
                    time.sleep(1.5)
                    act = answer
                if act in DRIPS:
                    return self.drip(act)
                status, said = (200, json.dumps(act(body))) if callable(act) else act
                self.send_response(status)
                self.send_header("Content-Length", str(len(said.encode())))
                if status == 429:
                    self.send_header("Retry-After", "1")
                self.end_headers()
                self.wfile.write(said.encode())

            def drip(self, which):
                """A whole answer in half a minute, a byte now and then, or as much of it as is waited for."""
                said = json.dumps(answer({}))
                head = f"HTTP/1.0 {503 if which == 'drip error' else 200} Yes\r\nContent-Length: {len(said)}\r\n\r\n"
                slow = head + said if which == "drip headers" else said
                if which != "drip headers":
                    self.wfile.write(head.encode())
                for byte in slow.encode():
                    try:
                        self.wfile.write(bytes([byte]))
                    except ConnectionError:
                        return
                    time.sleep(30 / len(slow))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def answer(body):
    """B, with log-probs where these are asked for."""
    choice = {"message": {"role": "assistant", "content": "B"}}
    if body.get("logprobs"):
        tops = [{"token": t, "logprob": math.log(p)} for t, p in (("B", 0.6), (" A", 0.15), ("A", 0.05), ("So", 0.2))]
        choice["logprobs"] = {"content": [{"token": "B", "logprob": math.log(0.6), "top_logprobs": tops}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}
