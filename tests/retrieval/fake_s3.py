"""As much of S3 as an index needs, in memory, on this machine: objects, ranges, listings, and writing only what is not there."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@contextmanager
def serving() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(address, objects by bucket and key) while the server runs."""
    objects: dict[str, bytes] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        @property
        def key(self) -> str:
            return unquote(urlsplit(self.path).path).strip("/")

        def do_PUT(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                if self.headers.get("If-None-Match") == "*" and self.key in objects:
                    return self.answer(412)
                objects[self.key] = body
            return self.answer(200, ETag=tag(body))

        def do_GET(self):
            asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            if "list-type" in asked:
                return self.answer(200, listing(objects, self.key, asked), Content_Type="application/xml")
            body = objects.get(self.key)
            if body is None:
                return self.answer(404)
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            if not wanted:
                return self.answer(200, body, ETag=tag(body))
            first, _, last = wanted.partition("-")
            start = int(first) if first else max(len(body) - int(last), 0)
            stop = min(int(last) + 1, len(body)) if first and last else len(body)
            return self.answer(206, body[start:stop], ETag=tag(body), Content_Range=f"bytes {start}-{stop - 1}/{len(body)}")

        do_HEAD = do_GET

        def do_DELETE(self):
            objects.pop(self.key, None)
            self.answer(204)

        def do_POST(self):  # the deletion of several
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            keys = [part.partition("</Key>")[0] for part in body.split("<Key>")[1:]]
            for key in keys:
                objects.pop(f"{self.key}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode(), Content_Type="application/xml")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()


def tag(body: bytes) -> str:
    return f'"{md5(body).hexdigest()}"'


def listing(objects: dict[str, bytes], bucket: str, asked: dict[str, str]) -> bytes:
    """One page with everything: ListObjectsV2."""
    prefix, delimiter, after = asked.get("prefix", ""), asked.get("delimiter", ""), asked.get("start-after", "")
    contents, prefixes = [], {}
    for name in sorted(objects):
        key = name.removeprefix(f"{bucket}/")
        if name == key or not key.startswith(prefix) or key <= after:
            continue
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
            prefixes[prefix + rest.partition(delimiter)[0] + delimiter] = None
        else:
            contents.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-30T00:00:00.000Z</LastModified>"
                f"<ETag>{tag(objects[name])}</ETag><Size>{len(objects[name])}</Size></Contents>"
            )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in prefixes)
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(contents)}{common}</ListBucketResult>".encode()
