"""The door of the page: which requests reach it, how large they may be, who is still there, and the pictures of finished jobs.

It stands before Gradio as ASGI middleware. Of Gradio's routes those that the page needs are open and no others: nothing is uploaded
but LoRA files, which it takes itself (`drops`), no file of this machine is served by its path, nothing is fetched for anybody.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from app.ui.drops import PREFIX as DROPPED
from app.ui.drops import Drops, answer
from app.ui.gallery import PREFIX, Gallery

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 4_500_000  # bytes of one request: four pictures that control have four million, all else a quarter of one
STREAM = "/gradio_api/queue/data"
OPEN = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|run/predict|cancel|reset|heartbeat/\w+|startup-events|app_id|info|login_check|theme\.css)/?")  # fmt: skip


class Presence:
    """Which clients look: a client is a tab, by the session that Gradio gave it, and looks while it holds a stream of events open."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()

    def here(self, client: str) -> bool:
        return self._streams[client] > 0 if client in self._streams else False

    def enter(self, client: str) -> None:
        self._streams[client] += 1

    def leave(self, client: str) -> None:
        self._streams[client] -= 1
        if self._streams[client] <= 0:
            del self._streams[client]


class Door:
    """ASGI middleware before `app`."""

    def __init__(self, app: App, gallery: Gallery, presence: Presence, drops: Drops | None = None) -> None:
        self._app, self._gallery, self._presence, self._drops = app, gallery, presence, drops

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)  # other kinds, websockets, are not answered

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path.startswith(PREFIX):
            picture = await asyncio.to_thread(self._gallery.read, path) if method in ("GET", "HEAD") else None
            await (_answer(send, 200, *picture) if picture is not None else _answer(send, 404))
        elif _foreign(scope):
            await _answer(send, 403)
        elif path.startswith(DROPPED) and method == "POST" and self._drops is not None:
            await self._drop(path, scope, receive, send)
        elif not OPEN.fullmatch(path) or method not in ("GET", "HEAD", "POST"):
            await _answer(send, 404)
        elif refusal := _too_large(scope):
            await _answer(send, refusal)
        elif path.rstrip("/") == STREAM:
            await self._stream(scope, receive, send)
        else:
            await self._app(scope, receive, _guarded(send))

    async def _drop(self, path: str, scope: Message, receive: Receive, send: Send) -> None:
        length = _length(scope)
        if length is None:
            await _answer(send, 411)
            return
        assert self._drops is not None
        taken = await self._drops.take(path, length, receive)
        await _answer(send, 200, answer(taken), {"content-type": "application/json", "x-content-type-options": "nosniff"})

    async def _stream(self, scope: Message, receive: Receive, send: Send) -> None:
        client = next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])), "")
        self._presence.enter(client)
        try:
            await self._app(scope, receive, _guarded(send))
        finally:
            self._presence.leave(client)


def _foreign(scope: Message) -> bool:
    """Whether another site's page sends this, from the user's browser: it could not read the answer, but set work going."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def _length(scope: Message) -> int | None:
    """The length of its body as a request says it; None where it says none, or no number."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    length = headers.get(b"content-length", b"")
    return int(length) if b"transfer-encoding" not in headers and length.isdigit() and len(length) < 16 else None


def _too_large(scope: Message) -> int:
    """The status that refuses a request for its body, 0 for none. A body must say its length, so that it is refused unread."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    if b"transfer-encoding" in headers:
        return 411
    length = headers.get(b"content-length", b"0")
    return 413 if not length.isdigit() or int(length) > MAX_BODY else 0


def _guarded(send: Send) -> Send:
    """Whatever is sent is taken for what it says it is."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
        await send(message)

    return sent


async def _answer(send: Send, status: int, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> None:
    """Answer without Gradio; a status alone has no body."""
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {"x-content-type-options": "nosniff"}).items()]
    pairs += [(b"content-length", str(len(body or b"")).encode())]
    if status in (411, 413):
        pairs += [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body or b""})
