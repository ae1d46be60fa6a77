import hashlib
import http.server
import io
import json
import re
import socket
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import download as module
from fastgpt.data.download import SETS, RemoteFile, RemoteSet, download
from fastgpt.errors import UserError
from fastgpt.finetune.labelled import class_counts, read_labelled
from fastgpt.tokenizer import Tokenizer

CONTENT = bytes(range(256)) * 1200  # several blocks
SHARED = Path(__file__).parents[3] / "shared" / "data"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. It cuts as many connections as `cuts` has, after so many bytes each; answers first with
    the `failures`, and knows ranges if `ranges`. `asked` has the Range header of each request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.clear()

    def clear(self):
        self.files, self.cuts, self.failures, self.ranges, self.asked = {}, [], [], True, []

    def url(self, path="file"):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.asked.append(self.headers["Range"])
        if self.server.failures:
            return self.send_error(self.server.failures.pop(0))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            return self.end_headers()
        if (content := self.server.files.get(self.path[1:])) is None:
            return self.send_error(404)
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and self.server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cuts.pop(0) if self.server.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    running.clear()
    running.files["file"] = CONTENT
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "RETRY_AFTER", (0.0, 0.0))
    return running


def remote(url, content=CONTENT, member=None):
    return RemoteFile("data.bin", url, len(content), hashlib.sha256(content).hexdigest(), member)


def zipped(content, member="inner"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme", "not this one")
        archive.writestr(member, content)
    return buffer.getvalue()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_received_once(server, tmp_path):
    seen = []
    folder = tmp_path / "deep" / "folder"
    assert download(remote(server.url()), folder, lambda *progress: seen.append(progress))
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert names(folder) == ["data.bin"]
    assert seen[-1] == ("data.bin", len(CONTENT), len(CONTENT))
    assert [received for _, received, _ in seen] == sorted({received for _, received, _ in seen})
    assert not download(remote(server.url()), folder)
    assert server.asked == [None]


def test_cut_connections_are_gone_on_with(server, tmp_path):
    server.cuts = [100_000, 70_000]
    assert download(remote(server.url()), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=170000-"]


def test_a_redirection_keeps_the_range(server, tmp_path):  # the Hub's, to where the weights are
    (tmp_path / ".data.bin.part").write_bytes(CONTENT[:100_000])
    assert download(remote(server.url("moved")), tmp_path)
    assert server.asked == ["bytes=100000-"] * 2


def test_the_next_call_goes_on_where_the_last_one_was_cut(server, tmp_path):
    server.cuts = [100_000, 70_000, 0]
    with pytest.raises(UserError, match=r"the connection ended after 170,000 of 307,200 bytes") as error:
        download(remote(server.url()), tmp_path)
    assert server.url() in str(error.value)
    assert names(tmp_path) == [".data.bin.part"]
    assert download(remote(server.url()), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=170000-"
    assert names(tmp_path) == ["data.bin"]


def test_what_was_stopped_before_the_checksum_is_only_checked(server, tmp_path):
    (tmp_path / ".data.bin.part").write_bytes(CONTENT)
    assert download(remote(server.url()), tmp_path)
    assert server.asked == [f"bytes={len(CONTENT)}-"]
    assert names(tmp_path) == ["data.bin"]


def test_a_server_without_ranges_begins_again(server, tmp_path):
    server.ranges = False
    (tmp_path / ".data.bin.part").write_bytes(b"some other bytes")
    assert download(remote(server.url()), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == ["bytes=16-"]


@settings(max_examples=25, deadline=None)
@given(content=st.binary(min_size=1, max_size=300), ranges=st.booleans(), data=st.data())
def test_any_cuts_leave_nothing_or_the_whole(running, tmp_path_factory, content, ranges, data):
    folder = tmp_path_factory.mktemp("cuts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        patch.setattr(module, "RETRY_AFTER", (0.0, 0.0))
        running.clear()
        running.files["file"], running.ranges = content, ranges
        running.cuts = data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5))
        file = remote(running.url(), content)
        for _ in range(2):  # each asks three times
            try:
                download(file, folder)
            except UserError:
                assert not (folder / "data.bin").exists()
    assert (folder / "data.bin").read_bytes() == content
    assert names(folder) == ["data.bin"]


@pytest.mark.parametrize("content", [b"<html>sign in to this network</html>", CONTENT[:-1] + b"!", CONTENT + b"more"])
def test_what_is_not_the_published_file_is_removed(server, tmp_path, content):
    server.files["file"] = content
    with pytest.raises(UserError, match=r"is not the published file .* and was removed") as error:
        download(remote(server.url()), tmp_path)
    assert server.url() in str(error.value)
    assert names(tmp_path) == []


def test_a_part_of_another_file_is_removed_and_the_next_call_begins_again(server, tmp_path):
    (tmp_path / ".data.bin.part").write_bytes(b"some other bytes")
    with pytest.raises(UserError, match="is not the published file"):
        download(remote(server.url()), tmp_path)
    assert download(remote(server.url()), tmp_path)
    assert server.asked == ["bytes=16-", None]


def test_a_server_that_fails_is_asked_three_times(server, tmp_path):
    server.failures = [503, 500]
    assert download(remote(server.url()), tmp_path)
    (tmp_path / "data.bin").unlink()
    server.failures = [503, 500, 502, 500]
    with pytest.raises(UserError, match="the server says 502 Bad Gateway"):
        download(remote(server.url()), tmp_path)
    assert server.failures == [500]


def test_what_is_gone_is_asked_for_once(server, tmp_path):
    advice = f"run this again where it can be reached, or put that file at {tmp_path / 'data.bin'}"
    with pytest.raises(UserError, match=re.escape(f"(the server says 404 Not Found): {advice}")):
        download(remote(server.url("gone")), tmp_path)
    assert len(server.asked) == 1
    assert names(tmp_path) == []


def test_no_network_is_one_line_with_url_and_place(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.05)

    def refusal(url):
        with pytest.raises(UserError) as error:
            download(remote(url), tmp_path)
        message = str(error.value)
        assert message.startswith(f"cannot download {url} (")
        assert message.endswith(f"put that file at {tmp_path / 'data.bin'}")
        assert "\n" not in message
        return message

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "timed out" in refusal(f"http://127.0.0.1:{port}/file")
    assert "refused" in refusal(f"http://127.0.0.1:{port}/file")
    assert "()" not in refusal("http://name.invalid/file")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", server.url(""))  # which knows no CONNECT
    monkeypatch.setattr("urllib.request._opener", None)  # or it keeps the proxies of the first call
    assert "Tunnel connection failed: 501" in refusal("https://name.invalid/file")
    assert names(tmp_path) == []


def test_the_member_of_a_zip_is_unpacked(server, tmp_path):
    server.files["set.zip"] = zipped(CONTENT)
    server.cuts = [500]
    file = remote(server.url("set.zip"), member="inner")
    assert download(file, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=500-"]
    assert names(tmp_path) == ["data.bin"]
    assert not download(file, tmp_path)


@pytest.mark.parametrize(
    "archive", [b"no zip", zipped(CONTENT, "another"), zipped(CONTENT + b"!"), zipped(CONTENT)[:-30]]
)
def test_a_zip_without_the_published_file_is_removed(server, tmp_path, archive):
    server.files["set.zip"] = archive
    with pytest.raises(UserError, match="is not the published file"):
        download(remote(server.url("set.zip"), member="inner"), tmp_path)
    assert names(tmp_path) == []


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_published_one(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT)
    assert not download(remote(server.url()), tmp_path)
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"data\.bin is not the published file .*remove it"):
        download(remote(server.url()), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    assert server.asked == []


def test_a_zip_put_there_by_hand_is_taken(server, tmp_path):
    file = remote("https://name.invalid/set.zip", member="inner")
    (tmp_path / "set.zip").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"set\.zip is not the published file"):
        download(file, tmp_path)
    (tmp_path / "set.zip").write_bytes(zipped(CONTENT))
    assert not download(file, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["data.bin", "set.zip"]


def test_where_nothing_can_be_written(server, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*file/data\.bin: a"):
        download(remote(server.url()), tmp_path / "file")


def test_one_process_at_a_time(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".data.bin.part", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is downloading"):
            download(remote(server.url()), tmp_path)
    assert download(remote(server.url()), tmp_path)


def test_the_command_lists_what_there_is(cli, refused):
    _, out, _ = cli("data", "download")
    assert all(name in out for name in SETS)
    assert f"no set is called shakespeare: take {', '.join(SETS)}" in refused("data", "download", "shakespeare")


def test_the_command_downloads_all_files_of_a_set(server, cli, refused, tmp_path, monkeypatch):
    files = {"a.txt": b"first", "b.txt": b"second"}
    server.files = dict(files)
    sources = [RemoteFile(n, server.url(n), len(c), hashlib.sha256(c).hexdigest()) for n, c in files.items()]
    monkeypatch.setitem(SETS, "letters", RemoteSet(tuple(sources), "CC0", "spelling"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("data", "download", "letters")
    assert code == 0
    assert "licence: CC0" in out
    assert "downloads/letters/a.txt: received" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "downloads" / "letters").iterdir()} == files
    assert "downloads/letters/b.txt: was there" in cli("data", "download", "letters")[1]
    del server.files["b.txt"]
    assert f"or put that file at {Path('elsewhere/b.txt')}" in refused(
        "data", "download", "letters", "--out", "elsewhere"
    )


@pytest.mark.parametrize("name", SETS)
def test_the_published_sets(name):
    files = SETS[name].files
    assert len({file.name for file in files}) == len(files)
    for file in files:
        assert file.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files in ../shared/data")
def test_the_real_files_are_taken_by_hand(tmp_path, cli):
    text = (SHARED / "tiny_shakespeare.txt").read_bytes()
    real = {
        "tiny-shakespeare": {"tiny_shakespeare.txt": text.rstrip(b"\n") + b"\n"},
        "sms-spam": {"sms+spam+collection.zip": zipped((SHARED / "sms_spam.tsv").read_bytes(), "SMSSpamCollection")},
        "instructions": {"instruction-data.json": (SHARED / "instruction-data.json").read_bytes()},
        "gpt2-tokenizer": {n: (SHARED / "gpt2" / n).read_bytes() for n in ("encoder.json", "vocab.bpe")},
    }
    for name, files in real.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        assert cli("data", "download", name, "--out", tmp_path / name)[0] == 0
        assert all((tmp_path / name / file.name).stat().st_size == file.size for file in SETS[name].files)
    assert Tokenizer.from_pretrained(tmp_path / "gpt2-tokenizer").vocab_size == 50_257
    assert len(json.loads((tmp_path / "instructions" / "instruction-data.json").read_text())) == 1_100
    assert class_counts(read_labelled(tmp_path / "sms-spam" / "sms_spam.tsv")) == {"ham": 4_827, "spam": 747}
