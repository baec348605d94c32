"""A stand-in for an OpenAI endpoint: tokens at known times, faults on demand.

    python openai_server.py PORT PLAN

Token n of an answer is the sum of the prompt plus n, modulo 11. A prompt that begins with a number
of FAULTS goes wrong in that way.
"""

import json
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = REFUSE, BREAK, ERROR, HANG = 101, 102, 103, 104


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._head(200 if self.path == "/health" else 404, "text/plain", 0)

    def do_POST(self):
        begin = time.perf_counter()
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and asked["stream"] and asked["return_token_ids"]
        assert asked["temperature"] == 0 and asked["ignore_eos"] and asked["model"] == "optpipe"
        prompt = asked["prompt"]
        if prompt[0] == REFUSE:
            content = b'{"error": {"message": "too long"}}'
            self._head(400, "application/json", len(content))
            self.wfile.write(content)
            return
        self._head(200, "text/event-stream", None)
        for n in range(asked["max_tokens"]):
            if prompt[0] == HANG and n == 1:
                time.sleep(60)
            if prompt[0] == BREAK and n == 2:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if prompt[0] == ERROR and n == 2:
                self._event({"error": {"message": "the engine died"}})
                return
            wait = PLAN["first_s"] + n * PLAN["token_s"]
            time.sleep(max(begin + wait - time.perf_counter(), 0))
            self._event({"choices": [{"text": "", "token_ids": [(sum(prompt) + n) % 11]}]})
        self._event("[DONE]")
        self._chunk(b"")

    def log_message(self, *_):
        pass

    def _head(self, status, kind, length):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _event(self, content):
        text = content if isinstance(content, str) else json.dumps(content)
        self._chunk(f"data: {text}\n\n".encode())

    def _chunk(self, content):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, *_):
        pass  # a client that has gone


if __name__ == "__main__":
    PLAN = json.loads(sys.argv[2])
    if "child" in PLAN:  # as an engine in a process of its own, one that does not end when asked
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-S", "-u", "-c", deaf], stdout=subprocess.PIPE)
        child.stdout.readline()
        print("child", child.pid, flush=True)
    if "fails" in PLAN:
        sys.exit(PLAN["fails"])
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
