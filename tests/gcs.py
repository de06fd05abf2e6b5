"""A fake Google Cloud Storage on the loopback: as much of its JSON API as gcsfs, TensorStore and Orbax use.

Objects live in memory and appear whole, with a new generation at each write, as in the real one.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit


class FakeStorage(ThreadingHTTPServer):
    """`objects[bucket][name]` is (generation, bytes)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}
        self.lock, self.generations = threading.Lock(), itertools.count(1_700_000_000_000_000)
        self.sessions: dict[str, tuple[str, str, bytearray]] = {}
        self.seen: list[tuple[str, str]] = []
        """(what, name) of each request: "read", "write", "list", …"""
        self.before: Callable[[str, str], None] = lambda what, name: None
        """Called before each request is carried out."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that shall take this for the real one."""
        return {
            **{"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url},
            **{"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "FSSPEC_GCS_TOKEN": "anon", "NO_GCE_CHECK": "true"},
            **{"GOOGLE_CLOUD_PROJECT": "fake", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
        }

    def names(self, prefix: str, bucket: str = "bucket") -> list[str]:
        """Names of objects that begin so."""
        with self.lock:
            return sorted(name for name in self.objects[bucket] if name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        with self.lock:
            return self.objects[bucket][name][1]

    def write(self, name: str, data: bytes, bucket: str = "bucket") -> tuple[int, bytes]:
        with self.lock:
            self.objects[bucket][name] = stored = (next(self.generations), bytes(data))
        return stored

    def delete(self, name: str, bucket: str = "bucket") -> None:
        with self.lock:
            del self.objects[bucket][name]

    def handle_error(self, *_):
        pass  # clients that were killed


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[FakeStorage]:
    """The fake, listening."""
    with FakeStorage(*buckets) as storage:
        thread = threading.Thread(target=storage.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield storage
        finally:
            storage.shutdown()
            thread.join()


class Failed(Exception):
    """With the HTTP status as its argument."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeStorage

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.body = self._read_body()
        try:
            if url.path.startswith("/session/"):
                self._continue(url.path)
            elif url.path.startswith("/upload/"):
                self._upload(re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path)[1])
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", url.path):
                self._copy(*map(unquote, match.groups()))
            elif match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", url.path):
                self._object(*map(unquote, match.groups()))
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", url.path):
                self._list(match[1])
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)", url.path):
                self._bucket(match[1])
                self._json({"kind": "storage#bucket", "name": match[1], "id": match[1]})
            else:
                raise Failed(404)
        except Failed as failed:
            code = failed.args[0]
            self._json({"error": {"code": code, "message": "refused", "errors": []}}, code)

    do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _begin(self, what: str, bucket: str, name: str) -> dict:
        self.server.seen.append((what, name))
        self.server.before(what, name)
        return self._bucket(bucket)

    def _bucket(self, name: str) -> dict:
        if name not in self.server.objects:
            raise Failed(404)
        return self.server.objects[name]

    def _object(self, bucket: str, name: str) -> None:
        kind = {"DELETE": "delete"}.get(self.command, "read" if self.query.get("alt") == "media" else "look")
        objects = self._begin(kind, bucket, name)
        if name not in objects:
            raise Failed(404)
        generation, data = objects[name]
        self._check(generation)
        if kind == "delete":
            self.server.delete(name, bucket)
            self._send(b"", 204)
        elif kind == "read":
            self._media(generation, data)
        else:
            self._json(_described(bucket, name, generation, data))

    def _media(self, generation: int, data: bytes) -> None:
        headers, code, whole = {"x-goog-generation": str(generation)}, 200, data
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            begin = int(first) if first else max(len(whole) - int(last), 0)
            end = min(int(last) + 1, len(whole)) if first and last else len(whole)
            if begin >= len(whole):
                raise Failed(416)
            data, code = whole[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(whole)}"
        self._send(data, code, headers)

    def _check(self, generation: int) -> None:
        wanted, unwanted = self.query.get("ifGenerationMatch"), self.query.get("ifGenerationNotMatch")
        if wanted is not None and int(wanted) != generation:
            raise Failed(412)
        if unwanted is not None and int(unwanted) == generation:
            raise Failed(304)

    def _upload(self, bucket: str) -> None:
        kind, name, data = self.query["uploadType"], self.query.get("name"), self.body
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, content, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary), self.body, maxsplit=3)
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            data = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
        elif kind == "resumable":
            name = name or json.loads(self.body)["name"]
        objects = self._begin("write", bucket, name)
        if kind == "resumable":
            path = f"/session/{next(self.server.generations)}"
            self.server.sessions[path] = bucket, name, bytearray()
            self._send(b"", 200, {"Location": self.server.url + path})
            return
        self._check(objects[name][0] if name in objects else 0)
        self._json(_described(bucket, name, *self.server.write(name, data, bucket)))

    def _continue(self, path: str) -> None:
        bucket, name, data = self.server.sessions[path]
        data += self.body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(data) < int(total):
            self._send(b"", 308, {"Range": f"bytes=0-{len(data) - 1}"})
        else:
            self._json(_described(bucket, name, *self.server.write(name, bytes(data), bucket)))

    def _copy(self, bucket: str, old: str, to_bucket: str, new: str) -> None:
        objects = self._begin("copy", bucket, new)
        self._bucket(to_bucket)
        if old not in objects:
            raise Failed(404)
        stored = self.server.write(new, objects[old][1], to_bucket)
        resource = _described(to_bucket, new, *stored)
        self._json({"kind": "storage#rewriteResponse", "done": True, "resource": resource})

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        self._begin("list", bucket, prefix)
        items, prefixes = [], []
        for name in self.server.names(prefix, bucket):
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if cut < 0 else name[: cut + len(delimiter)]
            held = items if cut < 0 else prefixes
            if not held or held[-1] != entry:
                held.append(entry)
        entries = sorted(items + prefixes)
        begin, size = int(self.query.get("pageToken", 0)), int(self.query.get("maxResults", 1000))
        page = set(entries[begin : begin + size])
        with self.server.lock:
            objects = dict(self.server.objects[bucket])
        answer = {
            "kind": "storage#objects",
            "items": [_described(bucket, name, *objects[name]) for name in items if name in page and name in objects],
            "prefixes": [name for name in prefixes if name in page],
        }
        if begin + size < len(entries):
            answer["nextPageToken"] = str(begin + size)
        self._json(answer)

    def _json(self, value, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, {"Content-Type": "application/json"})

    def _send(self, data: bytes, code: int, headers: dict | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(data)


def _described(bucket: str, name: str, generation: int, data: bytes) -> dict:
    return {
        **{"kind": "storage#object", "id": f"{bucket}/{name}/{generation}", "bucket": bucket, "name": name},
        **{"generation": str(generation), "metageneration": "1", "size": str(len(data)), "etag": str(generation)},
        **{"updated": "2020-01-01T00:00:00.000Z", "timeCreated": "2020-01-01T00:00:00.000Z"},
        **{"contentType": "application/octet-stream", "storageClass": "STANDARD"},
        "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
    }
