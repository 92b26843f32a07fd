"""A visitor of the page without a browser: what Gradio's own script sends, by hand; and anything else that somebody might send."""

import http.client
import json
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from urllib.parse import urlsplit

PATIENCE = 60  # seconds


def free_port() -> int:
    """A port that no other test takes: the system's choice, not the first one that is free from a number on."""
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return line.getsockname()[1]


class Visitor:
    """One tab of the page at `address`. client: its session, as Gradio names it."""

    def __init__(self, address: str) -> None:
        self.host, self.client = urlsplit(address).netloc, secrets.token_hex(6)
        self._config: dict = {}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, and body of one request."""
        line = http.client.HTTPConnection(self.host, timeout=PATIENCE)
        try:
            line.request(method, path, body, headers)
            answer = line.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            line.close()

    def config(self) -> dict:
        """What the page is built from, asked for once."""
        self._config = self._config or json.loads(self.ask("GET", "/config")[2])
        return self._config

    def event(self, name: str, what: str) -> tuple[int, list[int]]:
        """The number of the event `what` of the component with this elem_id (None: of the page), and its inputs."""
        config = self.config()
        ids = {component["props"].get("elem_id"): component["id"] for component in config["components"]}
        (dependency,) = [each for each in config["dependencies"] if [ids.get(name), what] in [list(target) for target in each["targets"]]]
        return dependency["id"], dependency["inputs"]

    def join(self, **values: object) -> None:
        """Press Generate with these values of components by elem_id, the others as the page first has them, without its example."""
        values = {"loras": [], "method": "merge", **values}
        number, inputs = self.event("generate", "click")
        props = {component["id"]: component["props"] for component in self.config()["components"]}
        data = [values.get(props[part].get("elem_id", "").replace("-", "_"), props[part].get("value")) for part in inputs]
        body = json.dumps({"data": data, "fn_index": number, "session_hash": self.client}).encode()
        status, _, answer = self.ask("POST", "/gradio_api/queue/join", body, **{"Content-Type": "application/json"})
        assert status == 200, answer

    @contextmanager
    def listening(self) -> Iterator[Iterator[dict]]:
        """The stream of events, open until the context ends."""
        line = http.client.HTTPConnection(self.host, timeout=PATIENCE)
        try:
            line.request("GET", f"/gradio_api/queue/data?session_hash={self.client}")
            answer = line.getresponse()
            assert answer.status == 200
            yield (json.loads(row[5:]) for row in answer if row.startswith(b"data:"))
        finally:
            if line.sock is not None:
                line.sock.close()
            line.close()

    def picture(self, **values: object) -> tuple[str, bytes]:
        """Make a picture: all that was shown on the way, and its bytes. Raises AssertionError with what was shown when there is none."""
        self.join(**values)
        with self.listening() as events:
            shown = shown_until(events, "process_completed")
        source = re.search(r'src="(/pictures/[^"]+)"', shown)
        assert source, shown[-2000:]
        status, headers, body = self.ask("GET", unescape(source[1]))
        assert status == 200 and headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"
        return shown, body


def shown_until(events: Iterator[dict], message: str) -> str:
    """Every word that came up to a message of this kind, or to words in what was shown."""
    words = []
    for event in events:
        words.append(json.dumps(event, ensure_ascii=False).replace('\\"', '"'))
        if event["msg"] == message or message in words[-1]:
            break
    return "\n".join(words)


def until(true, seconds: float = 20.0) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true())
