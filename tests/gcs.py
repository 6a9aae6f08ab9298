"""A server of this machine that speaks as much of Google Cloud Storage's JSON interface as gcsfs, TensorStore and ArrayRecord use.

Objects have generations, and conditions on them hold, which is what concurrent writers of a checkpoint rely on. In memory, one bucket.
"""

import email
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse

BUCKET = "bucket"


class Store:
    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}  # name -> content, generation
        self.uploads: dict[str, tuple[str, bytes]] = {}  # of resumable uploads under way: name, what has come
        self.failing: str | None = None  # requests that name this are refused
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)

    def put(self, name: str, content: bytes) -> dict:
        self.objects[name] = (content, next(self.numbers))
        return self.resource(name)

    def resource(self, name: str) -> dict:
        content, generation = self.objects[name]
        date = "2026-01-01T00:00:00.000Z"
        link = f"/download/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        sizes = {"size": str(len(content)), "generation": str(generation), "metageneration": "1", "mediaLink": link}
        return {"kind": "storage#object", "name": name, "bucket": BUCKET, "timeCreated": date, "updated": date, **sizes}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        body = json.dumps(body, indent=1).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if self.headers.get("Transfer-Encoding") != "chunked" else self.chunks()
        store, url = self.server.store, urllib.parse.urlsplit(self.path)
        if store.failing and store.failing in urllib.parse.unquote(self.path):
            self.answer(403, {"error": {"code": 403, "message": "no permission"}})
            return
        with store.lock:
            try:
                self.route(store, url.path, dict(urllib.parse.parse_qsl(url.query)), body)
            except KeyError:
                self.answer(404, {"error": {"code": 404, "message": "Not Found"}})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refused(self, store: Store, name: str, query: dict[str, str]) -> bool:
        """Whether a condition on the object's generation does not hold; then that is answered."""
        now = store.objects[name][1] if name in store.objects else 0
        if int(query.get("ifGenerationMatch", now)) != now:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            return True
        if now and int(query.get("ifGenerationNotMatch", -1)) == now:
            self.answer(304)
            return True
        return False

    def route(self, store: Store, path: str, query: dict[str, str], body: bytes) -> None:
        if path == f"/upload/storage/v1/b/{BUCKET}/o":
            self.upload(store, query, body)
        elif path.startswith("/batch/"):
            self.batch(store, body)
        elif found := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/rewriteTo/b/[^/]+/o/([^/]+)", path):
            source, target = map(urllib.parse.unquote, found.groups())
            self.answer(200, {"done": True, "resource": store.put(target, store.objects[source][0])})
        elif found := re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)", path):
            self.one(store, urllib.parse.unquote(found.group(1)), query)
        elif path == f"/storage/v1/b/{BUCKET}/o":
            self.listing(store, query)
        elif path == f"/storage/v1/b/{BUCKET}":
            self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "location": "HERE", "storageClass": "STANDARD"})
        else:
            self.answer(404, {"error": {"code": 404, "message": f"Not Found: {path}"}})

    def one(self, store: Store, name: str, query: dict[str, str]) -> None:
        content, generation = store.objects[name]
        if self.refused(store, name, query):
            return
        if self.command == "DELETE":
            del store.objects[name]
            self.answer(204)
        elif query.get("alt") != "media":
            self.answer(200, store.resource(name))
        else:
            headers = {"Content_Type": "application/octet-stream", "x_goog_generation": str(generation)}
            if not (part := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
                self.answer(200, content, **headers)
                return
            first, last = int(part[1] or max(0, len(content) - int(part[2]))), len(content) - 1
            if part[1] and part[2]:
                last = min(int(part[2]), last)
            if first >= len(content):
                self.answer(416)
                return
            self.answer(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}", **headers)

    def listing(self, store: Store, query: dict[str, str]) -> None:
        """One page; a page holds 7 names, so that clients have to ask for more."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names: dict[str, bool] = {}  # whether it is an object, or stands for many
        for name in sorted(store.objects):
            inside = name.startswith(prefix) and name >= query.get("startOffset", "") and name < query.get("endOffset", "\U0010ffff")
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name[len(prefix) :], "", "")
            if inside:
                names[prefix + head + cut] = not cut
        rest = [name for name in sorted(names) if name > query.get("pageToken", "")]
        page, more = rest[:7], rest[7:]
        items = [store.resource(name) for name in page if names[name]]
        found = {"kind": "storage#objects", "items": items, "prefixes": [name for name in page if not names[name]]}
        self.answer(200, found | ({"nextPageToken": page[-1]} if more else {}))

    def upload(self, store: Store, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "multipart":
            parts = email.message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body).get_payload()
            query, body = query | {"name": json.loads(parts[0].get_payload())["name"]}, self.last_part(body)
        if "upload_id" in query:
            name, so_far = store.uploads[query["upload_id"]]
            store.uploads[query["upload_id"]] = (name, so_far + body)
            if self.headers["Content-Range"].endswith("/*"):
                self.answer(308, Range=f"bytes=0-{len(so_far + body) - 1}")
            else:
                self.answer(200, store.put(name, so_far + body))
        elif query["uploadType"] == "resumable":
            name, number = query.get("name") or json.loads(body)["name"], str(next(store.numbers))
            store.uploads[number] = (name, b"")
            self.answer(
                200, Location=f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
            )
        elif not self.refused(store, query["name"], query):
            self.answer(200, store.put(query["name"], body))

    def last_part(self, body: bytes) -> bytes:
        """The content in a multipart body, whose bytes the email package would take for text."""
        boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])[1].encode()
        part = body.split(b"--" + boundary)[2].replace(b"\r\n\r\n", b"\n\n", 1)
        return part.partition(b"\n\n")[2].removesuffix(b"\r\n").removesuffix(b"\n")

    def batch(self, store: Store, body: bytes) -> None:
        answers = []
        for name in re.findall(rb"DELETE \S*/o/(\S+) HTTP", body):
            gone = store.objects.pop(urllib.parse.unquote(name.decode()), None)
            status = "204 No Content" if gone else "404 Not Found"
            answers.append(f"--x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        self.answer(200, ("".join(answers) + "--x--\r\n").encode(), Content_Type="multipart/mixed; boundary=x")


class Server(http.server.ThreadingHTTPServer):
    """Its `store` may be looked into, and made to fail."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store = Store()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """Clients hang up as they like."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send the clients here."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        names = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"), address)
        return names | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "FSSPEC_GS_TOKEN": "anon", "NO_GCE_CHECK": "true"}
