"""Downloads from a server that cuts, lies, restarts and forgets ranges."""

import hashlib
import http.server
import json
import threading

import pytest

from edge import fetch
from edge.fetch import BlobCache, FetchError, Server
from protocol.manifest import Blob

DATA = bytes(range(256)) * 8000  # 2 MB
SHA = hashlib.sha256(DATA).hexdigest()
BLOB = Blob(sha256=SHA, bytes=len(DATA))


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves DATA; `server.plan` holds one fault for each request to come."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.server.plan.pop(0) if self.server.plan else "fine"
        asked = self.headers.get("Range")
        self.server.seen.append((fault, asked, self.headers.get("Authorization")))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if fault == "500":
            return self.answer(503, json.dumps({"error": "starting"}).encode())
        if fault == "404":
            return self.answer(404, json.dumps({"error": "known profiles: pixel_8"}).encode())
        if fault == "no range":
            asked, start = None, 0
        body = DATA[start:]
        if fault == "swapped":
            body = b"x" * len(body)
        if fault == "long":
            body += b"x"
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 3])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def answer(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def faulty():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.plan, server.seen = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_blob_is_fetched_once(faulty, tmp_path):
    server = Server(faulty.url)
    server.token = "secret"
    cache = BlobCache(server, tmp_path)
    assert cache.get(BLOB).read_bytes() == DATA
    cache.get(BLOB)
    BlobCache(server, tmp_path).get(BLOB)
    assert faulty.seen == [("fine", None, "Bearer secret")]
    assert names(tmp_path) == [SHA]
    assert cache.bytes_down == len(DATA)


def test_a_cut_download_is_resumed(faulty, tmp_path):
    faulty.plan = ["cut", "cut", "500", "fine"]
    cache = BlobCache(Server(faulty.url), tmp_path)
    assert cache.get(BLOB).read_bytes() == DATA
    assert cache.bytes_down == len(DATA)
    starts = [int(asked[6:-1]) for _, asked, _ in faulty.seen if asked]
    assert starts[0] == len(DATA) // 3
    assert starts == sorted(starts)


def test_a_part_of_a_killed_process_is_resumed(faulty, tmp_path):
    (tmp_path / f"{SHA}.part").write_bytes(DATA[:1000])
    assert BlobCache(Server(faulty.url), tmp_path).get(BLOB).read_bytes() == DATA
    assert faulty.seen[0][1] == "bytes=1000-"


def test_a_server_without_ranges(faulty, tmp_path):
    faulty.plan = ["no range"]
    (tmp_path / f"{SHA}.part").write_bytes(b"1" * 1000)
    assert BlobCache(Server(faulty.url), tmp_path).get(BLOB).read_bytes() == DATA


def test_a_swapped_blob_is_refused_and_fetched_once_more(faulty, tmp_path, caplog):
    faulty.plan = ["swapped"]
    assert BlobCache(Server(faulty.url), tmp_path).get(BLOB).read_bytes() == DATA
    assert len(caplog.records) == 1
    assert "refused, fetching it again" in caplog.text


def test_a_blob_that_is_wrong_twice_leaves_nothing(faulty, tmp_path):
    faulty.plan = ["swapped", "swapped", "swapped"]
    with pytest.raises(FetchError, match="refused twice"):
        BlobCache(Server(faulty.url), tmp_path).get(BLOB)
    assert len(faulty.seen) == 2
    assert names(tmp_path) == []


def test_a_blob_longer_than_announced(faulty, tmp_path):
    faulty.plan = ["long"]
    with pytest.raises(FetchError, match="more than the"):
        BlobCache(Server(faulty.url), tmp_path).get(BLOB)
    assert SHA not in names(tmp_path)


@pytest.mark.parametrize("harm", [b"", DATA[:-1], b"y" + DATA[1:]])
def test_a_corrupted_blob_in_the_cache_is_replaced(faulty, tmp_path, caplog, harm):
    (tmp_path / SHA).write_bytes(harm)
    assert BlobCache(Server(faulty.url), tmp_path).get(BLOB).read_bytes() == DATA
    assert "corrupted" in caplog.text


def test_a_corrupted_part_costs_one_more_download(faulty, tmp_path):
    (tmp_path / f"{SHA}.part").write_bytes(b"z" * 1000)
    assert BlobCache(Server(faulty.url), tmp_path).get(BLOB).read_bytes() == DATA


def test_a_refusal_is_not_repeated(faulty, tmp_path):
    faulty.plan = ["404"]
    with pytest.raises(FetchError, match="404 known profiles: pixel_8"):
        Server(faulty.url).manifest("pixel8")
    assert len(faulty.seen) == 1


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    with pytest.raises(FetchError, match=r"no /v1/base for 0 s: .*refused"):
        Server("http://127.0.0.1:9", patience=0.0).base()


@pytest.mark.parametrize("url", ["localhost:8470", "ftp://x", "http://[::1"])
def test_an_address_that_is_none(url):
    with pytest.raises(FetchError):
        Server(url).base()


def test_answers_that_are_no_json(faulty):
    with pytest.raises(FetchError, match="not JSON"):
        Server(faulty.url).base()
