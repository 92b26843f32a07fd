"""The second opinion: both orders, ties, resuming, plain errors; a server of our own stands for the endpoint."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from app.evaluation import mllm
from composition import Refused


@pytest.fixture
def server():
    """(address, questions asked, how it answers): a function of the two pictures' mean red, settable."""
    asked, answer = [], {"how": lambda first, second: "first" if first > second else "second" if second > first else "tie", "code": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            parts = body["messages"][0]["content"]
            reds = [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))).resize((1, 1)).getpixel((0, 0))[0]
                    for part in parts[1:]]
            text = json.dumps({"better": answer["how"](*reds)})
            data = json.dumps({"choices": [{"message": {"content": f"Well.\n```json\n{text}\n```"}}]}).encode()
            self.send_response(answer["code"])
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked, answer
    httpd.shutdown()


@pytest.fixture
def scored(tmp_path):
    """Three prompts by two methods: `a` is redder in two, alike in one."""
    rows = []
    for number, (one, two) in enumerate(((200, 50), (210, 60), (90, 90))):
        for variant, red in (("a", one), ("b", two), ("none", 255)):
            Image.new("RGB", (16, 16), (red, 0, 0)).save(tmp_path / f"{variant}{number}.png")
            rows.append({"variant": variant, "group": f"g{number}", "number": 0, "id": f"{variant}{number}", "text": "red", "picture": f"{variant}{number}.png"})
    return rows


def test_both_orders_are_asked_and_ties_are_told(server, scored, tmp_path, monkeypatch):
    address, asked, _ = server
    monkeypatch.setenv("MEDLEY_MLLM_KEY", "secret")
    (found,) = mllm.compare(mllm.Endpoint.read(address, "judge-1"), tmp_path, scored, ["none", "a", "b"], 50, resamples=100, seed=0)
    assert (found["first_wins"], found["second_wins"], found["ties"], found["order_decided"]) == (2, 0, 1, 0.0)
    assert found["difference"]["mean"] == pytest.approx(2 / 3)
    assert len(asked) == 6 and {path for path, *_ in asked} == {"/v1/chat/completions"}
    assert asked[0][1] == "Bearer secret" and asked[0][2]["model"] == "judge-1"


def test_a_judge_that_favours_a_position_gives_ties_and_is_reported(server, scored, tmp_path):
    address, _, answer = server
    answer["how"] = lambda first, second: "first"
    (found,) = mllm.compare(mllm.Endpoint.read(address, "m"), tmp_path, scored, ["a", "b"], 50, resamples=100, seed=0)
    assert (found["first_wins"], found["ties"], found["order_decided"], found["difference"]["mean"]) == (0, 3, 1.0, 0.0)


def test_answers_are_kept(server, scored, tmp_path):
    address, asked, _ = server
    for _ in range(2):
        mllm.compare(mllm.Endpoint.read(address, "m"), tmp_path, scored, ["a", "b"], 2, resamples=100, seed=0)
    assert len(asked) == 4


def test_trouble_is_said_plainly(server, scored, tmp_path, monkeypatch):
    address, asked, answer = server
    answer["code"] = 401
    with pytest.raises(Refused, match="401"):
        mllm.compare(mllm.Endpoint.read(address, "m"), tmp_path, scored, ["a", "b"], 1, resamples=100, seed=0)
    assert len(asked) == 1  # not asked again
    answer |= {"code": 200, "how": lambda first, second: "both"}
    with pytest.raises(Refused, match="did not answer as asked"):
        mllm.compare(mllm.Endpoint.read(address, "m"), tmp_path, scored, ["a", "b"], 1, resamples=100, seed=0)
    monkeypatch.setattr(mllm, "WAIT", 0.0)
    with pytest.raises(Refused, match="cannot be reached"):
        mllm.Endpoint.read("http://127.0.0.1:9", "m").better("x", tmp_path / "a0.png", tmp_path / "b0.png")


def test_from_the_command_line_it_stands_in_the_report_and_its_trouble_costs_no_report(server, medley, tmp_path):
    address, _, answer = server
    lines = []
    for number in range(2):
        for variant, red in (("a", 200), ("b", 50)):
            Image.new("RGB", (16, 16), (red, 0, 0)).save(tmp_path / f"{variant}{number}.png")
            lines.append({"file_name": f"{variant}{number}.png", "text": f"red {number}", "method": variant})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert medley("evaluate", "m.jsonl", "--mllm", address, "--mllm-model", "m", "--report", "r").code == 0
    (found,) = json.loads((tmp_path / "r/summary.json").read_text())["mllm"]
    assert (found["first"], found["first_wins"], found["ties"]) == ("a", 2, 0)
    assert "Second opinion: a against b: 2 to 0" in (tmp_path / "r/index.html").read_text()
    answer["code"] = 403
    said = medley("evaluate", "m.jsonl", "--mllm", address, "--mllm-model", "other", "--report", "r2")
    assert said.code == 3 and "403" in said.err and (tmp_path / "r2/index.html").is_file()
