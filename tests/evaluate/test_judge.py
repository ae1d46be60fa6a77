import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastgpt import UserError
from fastgpt.evaluate.judge import Judge

ITEM = {"prompt": "Say hi.", "expected": "Hi!", "answer": "Hello {you}."}
KEY = "sk-very-secret"


@pytest.fixture
def server(monkeypatch):
    """A server that gives out `replies` in turn, the last one again and again: (status, text or whole body)."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            status, reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if isinstance(reply, str):
                reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            content = json.dumps(reply).encode() if isinstance(reply, dict) else reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if 300 <= status < 400:
                self.send_header("Location", "/v1/elsewhere")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    replies, seen = [], []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    http.replies, http.seen, http.url = replies, seen, f"http://127.0.0.1:{http.server_port}/v1"
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


def judge(server, **options):
    return Judge(server.url, "judge-1", key=KEY, **{"wait": 0.01, "timeout": 5, **options})


def test_a_score_is_asked_for_and_read(server):
    server.replies[:] = [(200, " 85\n")]
    assert judge(server).scores([ITEM] * 3) == [{"judge": 85, "judge_reply": " 85\n"}] * 3
    path, authorization, body = server.seen[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "judge-1")
    question = body["messages"][0]["content"]
    assert all(text in question for text in ITEM.values())
    assert len(server.seen) == 3


def test_scores_stand_in_the_order_of_the_items(server):
    server.replies[:] = [(200, str(i)) for i in range(20)]
    scores = judge(server).scores([ITEM] * 20, at_once=1)
    assert [s["judge"] for s in scores] == list(range(20))


@pytest.mark.parametrize("reply", ["Score: 85", "85/100", "101", "-5", "8.5", "", "eighty", "85 90", "٣"])
def test_what_is_no_score_counts_as_none_and_is_kept(server, reply):
    server.replies[:] = [(200, reply)]
    assert judge(server).scores([ITEM]) == [{"judge": None, "judge_reply": reply}]


def test_no_key_no_header(server):
    server.replies[:] = [(200, "1")]
    assert judge(server, **{"wait": 0.01}).ask("x") == "1"
    assert Judge(server.url + "/", "m").ask("x") == "1"
    assert server.seen[1][:2] == ("/v1/chat/completions", None)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_failing_server_is_asked_again(server, status):
    server.replies[:] = [(status, {"error": "busy"})] * 2 + [(200, "70")]
    assert judge(server).scores([ITEM])[0]["judge"] == 70
    assert len(server.seen) == 3
    server.replies[:] = [(status, b"busy\nnow")]
    with pytest.raises(UserError, match=rf"answered {status} .*\(busy now\), 2 times"):
        judge(server, attempts=2).ask("x")


def test_a_model_that_takes_no_temperature(server):
    server.replies[:] = [(400, {"error": {"message": "Unsupported value: 'temperature'"}}), (200, "5")]
    asked = judge(server)
    assert [s["judge"] for s in asked.scores([ITEM, ITEM], at_once=1)] == [5, 5]
    assert ["temperature" in body for _, _, body in server.seen] == [True, False, False]


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_a_refusal_is_said_at_once_and_the_key_never(server, status):
    server.replies[:] = [(status, f"the key {KEY}\nis wrong".encode())]
    with pytest.raises(UserError) as error:
        judge(server).scores([ITEM] * 4, at_once=1)
    assert f"answered {status} " in str(error.value)
    assert "the key *** is wrong" in str(error.value)
    assert KEY not in str(error.value)
    assert KEY not in repr(error.value)
    assert "\n" not in str(error.value)
    assert len(server.seen) < 4


def test_no_redirect_is_followed_with_the_key(server):
    server.replies[:] = [(302, b"")]
    with pytest.raises(UserError, match="answered 302"):
        judge(server).ask("x")
    assert len(server.seen) == 1


@pytest.mark.parametrize("body", [b"<html>", {"choices": []}, {"error": "no"}, b"[]"])
def test_what_is_no_chat_completion(server, body):
    server.replies[:] = [(200, body)]
    with pytest.raises(UserError, match="gave no chat completion: check --judge-url"):
        judge(server).ask("x")


def test_nobody_there(server):
    gone = Judge("http://127.0.0.1:9", "m", key=KEY, attempts=2, wait=0.01)
    with pytest.raises(UserError, match=r"cannot be reached: .*refused.*, 2 times: check --judge-url"):
        gone.ask("x")
    with pytest.raises(UserError, match="must begin with http"):
        Judge("file:///etc/hosts", "m")


def test_a_server_that_is_silent(server):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asked = Judge(f"http://127.0.0.1:{silent.getsockname()[1]}", "m", timeout=0.1, attempts=2, wait=0.01)
        with pytest.raises(UserError, match="cannot be reached: timed out, 2 times"):
            asked.ask("x")
