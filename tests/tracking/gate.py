"""A gate before an MLflow server, which can misbehave as servers do."""

import http.client
import http.server
import threading


class Gate:
    """Passes requests on to a server; may be shut, answer by itself, or pass them on and lose the answer."""

    def __init__(self, target_port: int = 0, status: int = 0) -> None:
        self.status = status  # answered in the server's place, unless 0
        self.body = b"out of order"
        self.refused = 0
        self.missing = ""  # a part of the paths that it does not know
        self.lose: list[str] = []
        self.lost: list[str] = []
        gate = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if gate.status or (gate.missing and gate.missing in self.path):
                    gate.refused += 1
                    self._answer(gate.status or 404, gate.body, "text/plain")
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", target_port, timeout=30)
                upstream.request(self.command, self.path, body, {"Content-Type": "application/json"})
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                for ending in gate.lose:
                    if self.path.endswith(ending):
                        gate.lose.remove(ending)
                        gate.lost.append(ending)
                        self.close_connection = True
                        return
                self._answer(answer.status, data, answer.headers.get("Content-Type", "application/json"))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def _answer(self, status: int, data: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None: ...

        self._handler, self._port = Handler, 0
        self.open()
        self.uri = f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Nobody listens any more: a connection is refused, as by a dead server."""
        self._server.shutdown()
        self._server.server_close()
