"""The page as a stranger on the wire meets it: 20 clients at once, who goes away, what is served, what may be sent, hostile files.

SECURITY.md's promises about the page and their tests:
- no setting of the user's for Gradio: test_the_users_variables_for_gradio_are_not_read
- pictures of finished jobs alone, as pictures: test_nothing_but_pictures_of_finished_jobs_is_served
- nothing is uploaded but LoRA files, bodies are small: test_nothing_can_be_uploaded, test_lora_files_alone_are_taken; test_choices.py
- only the routes that the page needs: test_only_the_routes_of_the_page_are_open
- each its own picture, nobody another's: test_soak_of_100_requests_from_20_clients
- a client that goes away costs one evaluation: test_a_client_that_goes_away_..., test_a_client_that_never_looks_...
- a fair line, a limit on cost: tests/app/test_jobs.py; here test_a_picture_that_costs_too_much_is_refused_on_the_page
- one file never takes down the page, no file is read on the loop: test_bad_files_...
"""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from app.ui import cards, compose_form, making, page, serve
from composition import Engine, Request, record
from tests.app.ui.visitor import Visitor, free_port, shown_until, until

pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword).*")  # gradio on pandas 3
ROOT = Path(__file__).parents[3]
GRADIO = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_ROOT_PATH": "/elsewhere", "GRADIO_MCP_SERVER": "True", "GRADIO_SSR_MODE": "True",
          "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_RUN_HISTORY": "True", "GRADIO_PROFILING": "1", "GRADIO_VIBE_MODE": "1",
          "GRADIO_DEFAULT_CONCURRENCY_LIMIT": "1", "GRADIO_ANALYTICS_ENABLED": "True"}  # fmt: skip
BAD = ("dangling", "pipe", "folder", "null", "numbers", "zeros", "empty", "closed", "loop", "deep", "markup")


def hostile_folder(folder: Path, owl: Path) -> None:
    """Files that a folder of LoRAs should not have."""
    folder.mkdir()
    data = owl.read_bytes()
    length = int.from_bytes(data[:8], "little")

    def with_metadata(name: str, value: object) -> None:
        header = json.dumps(json.loads(data[8 : 8 + length]) | {"__metadata__": value}).encode()
        (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])

    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    with_metadata("null", None)
    with_metadata("numbers", {"title": 3, "trigger_words": [1], "preview": {"a": 1}, "category": ["x"]})
    with_metadata("deep", {"ss_tag_frequency": "[" * 50_000, "title": "x" * 100_000, "preview": "iVBORw0KGgo" * 1000})
    (folder / "zeros.safetensors").write_bytes(b"\0" * 64)
    (folder / "empty.safetensors").touch()
    (folder / "closed.safetensors").write_bytes(data)
    (folder / "closed.safetensors").chmod(0)
    save_file(load_file(owl), folder / "markup.safetensors", metadata={"title": "</script><b>${1}{{2}}", "trigger_words": "<img src=x>"})
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b[31m.safetensors")).write_bytes(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(address, folder of pictures, folder of LoRAs, engine) of a page started beside bad files, with the user's variables against it."""
    root = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch, Engine.open("pocket", device="cpu", folders=[root / "own"]) as engine:
        hostile_folder(root / "own", engine.find("owl"))
        for name, value in GRADIO.items():
            patch.setenv(name, value)
        with serve.opened(engine, root / "pictures", free_port(), longest=7200) as address:
            yield address, root / "pictures", root / "own", engine
        assert {name: os.environ[name] for name in GRADIO} == GRADIO


@pytest.fixture
def visitor(place):
    return Visitor(place[0])


def test_the_users_variables_for_gradio_are_not_read(place, visitor, tmp_path):
    assert place[0].startswith("http://127.0.0.1:") and place[0].count("/") == 3
    assert not [name for name in os.environ if name.startswith("GRADIO_") and name != "GRADIO_ANALYTICS_ENABLED"]
    config = visitor.config()
    assert config["run_history"] is False and config["analytics_enabled"] is False and not config.get("mcp_server")
    (tmp_path / "gradio.py").write_text("import os; print([name for name in os.environ if name.startswith('GRADIO_')]); raise SystemExit")
    code = ("from types import SimpleNamespace as N\nfrom app.ui import serve\nfrom pathlib import Path\n"
            "with serve.opened(N(backbone=N(placement=None, decode=None), name='x'), Path('.'), 1): pass")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          env=os.environ | GRADIO | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.stdout == "['GRADIO_ANALYTICS_ENABLED']\n", done.stderr  # what gradio finds when it is imported


def test_nothing_is_recorded_or_reported(place, visitor):
    config = visitor.config()
    assert config["footer_links"] == [] and not any(str(place[1].parent) in str(part) for part in config["components"])
    assert not re.search(r"""(?:src|href)=["']https?://(?!127\.0\.0\.1)""", visitor.ask("GET", "/")[2].decode())


def test_soak_of_100_requests_from_20_clients(place):
    """Each gets the picture of its own prompt and seed, and nobody another's; the pictures are those of the engine."""
    def five(client: int) -> list[bytes]:
        visitor = Visitor(place[0])
        own = []
        for turn in range(5):
            number = 5 * client + turn
            shown, body = visitor.picture(prompt=f"picture {number}", steps=1, random=False, seed=number)
            request = record.details(_file(place[1].parent / f"{number}.png", body)).request
            assert (request.prompt, request.seed) == (f"picture {number}", number)
            assert not [other for other in range(100) if other != number and f'"picture {other}"' in shown]
            own.append(body)
        return own

    with ThreadPoolExecutor(20) as pool:
        pictures = [body for own in pool.map(five, range(20)) for body in own]
    assert len(pictures) == 100
    for number in (0, 37, 99):
        alone = place[3].run(Request(prompt=f"picture {number}", steps=1, seed=number)).images[0]
        with Image.open(io.BytesIO(pictures[number])) as image:
            assert image.tobytes() == alone.tobytes()


def _file(path: Path, body: bytes) -> Path:
    path.write_bytes(body)
    return path


def _free(place) -> None:
    """Nothing is made any more: another visitor's picture comes at once."""
    begun = time.monotonic()
    Visitor(place[0]).picture(prompt="after", steps=1)
    assert time.monotonic() - begun < 20


def test_a_client_that_goes_away_while_its_picture_is_made_cancels_it(place, visitor):
    visitor.join(prompt="left alone", steps=1000, size="128x128")
    with visitor.listening() as events:
        shown = shown_until(events, "Step ")
        assert "Step" in shown, shown[-600:]
    _free(place)


def test_a_client_that_never_looks_has_no_picture_made(place, visitor, monkeypatch):
    monkeypatch.setattr(making, "GRACE", 0.5)
    for _ in range(3):
        visitor.join(prompt="nobody looks", steps=1000, size="256x256")
    _free(place)


def test_a_picture_that_costs_too_much_is_refused_on_the_page(visitor):
    visitor.join(prompt="large", steps=1000, size="4096x4096")
    with visitor.listening() as events:
        assert "4096x4096 would take about" in shown_until(events, "process_completed")


def test_one_client_waits_for_its_own_pictures_alone(place, visitor):
    """More than its share is refused at once; another client's picture does not wait for them."""
    for _ in range(12):
        visitor.join(prompt="many", steps=1000, size="128x128")
    with visitor.listening() as events:
        assert "8 pictures of yours are waiting already" in shown_until(events, "of yours are waiting")
        other = Visitor(place[0])
        other.join(prompt="one", steps=1)
        with other.listening() as mine:
            assert "Waiting: 1 before this one." in shown_until(mine, "Waiting: ")
    _free(place)


def test_options_of_every_method_reach_the_picture(place, visitor):
    """Off as the page first is; on, in the record and among the remarks."""
    plain = visitor.picture(prompt="a raccoon", steps=2, loras=[{"key": "raccoon", "weight": 1}])[1]
    shown, body = visitor.picture(prompt="a raccoon", steps=2, loras=[{"key": "raccoon", "weight": 1}], anchored=True, windows="both")
    before, request = (record.details(_file(place[1].parent / f"{name}.png", data)).request for name, data in (("plain", plain), ("both", body)))
    assert not before.anchored and not before.windows and before.loras[0].end == 1.0
    assert request.anchored and request.windows and request.loras[0].end == 0.7
    assert "raccoon is on from 0% to 70% of the steps, by its category" in shown


def test_nothing_but_pictures_of_finished_jobs_is_served(place, visitor):
    _, folder, _, engine = place
    shown, body = visitor.picture(prompt="served", steps=1)
    (address,) = {part.split('"')[0] for part in shown.split('src="')[1:] if part.startswith("/pictures/")}
    status, headers, _ = visitor.ask("HEAD", address)
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    newest = max(folder.glob("*.png"))
    assert newest.read_bytes() == body
    (folder / ".secret").write_text("x")
    (folder / "page.html").write_text("<script>alert(1)</script>")
    Image.new("RGB", (8, 8)).save(folder / "old.png")
    for name in (".secret", "page.html", "old.png", "metadata.jsonl", newest.name):
        for path in (f"/gradio_api/file={folder / name}", f"/file={folder / name}", f"/gradio_api/file/{folder / name}", f"/pictures/{name}",
                     f"{address.rpartition('/')[0]}/{name}" if name != newest.name else f"/pictures/x/{name}", f"{address}/../{name}",
                     f"/pictures/../{name}", f"/pictures/{folder}/{name}", f"/static/../{folder}/{name}", f"/assets/..%2f..{folder}/{name}"):
            status, headers, answer = visitor.ask("GET", path)
            assert status in (400, 403, 404), path
            assert headers["x-content-type-options"] == "nosniff"
    newest.unlink()
    newest.symlink_to(engine.find("owl"))  # what took a picture's place is not served either
    assert visitor.ask("GET", address)[0] == 404
    newest.unlink()
    os.mkfifo(newest)
    assert visitor.ask("GET", address)[0] == 404
    newest.unlink()


def test_nothing_can_be_uploaded(place, visitor):
    boundary = "x"
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--{boundary}--\r\n'.encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/gradio_api/process_recording"):
        assert visitor.ask("POST", path, part, **kind)[0] == 404
    for length in ("4500001", "99999999999999999999", "-1", "x"):
        line = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n"
        assert _raw(place[0], line % length.encode()) in (400, 413)
    chunked = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n"
    assert _raw(place[0], chunked) == 411


def test_lora_files_alone_are_taken(place, visitor):
    """By a page of this server, with a length, as safetensors; what is no LoRA is not kept; and no dropped file is served."""
    data = Path(place[3].find("owl")).read_bytes()
    assert visitor.ask("POST", "/dropped/a.safetensors", data, Origin="https://elsewhere.example")[0] == 403
    for method in ("GET", "PUT", "DELETE"):
        assert visitor.ask(method, "/dropped/a.safetensors")[0] in (404, 405)
    chunked = b"POST /dropped/a.safetensors HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert _raw(place[0], chunked) == 411
    for name, body in (("a.pt", data), ("a.safetensors", b"x" * 100), ("..%2Fa.safetensors", data[:-5])):
        status, _, answer = visitor.ask("POST", f"/dropped/{name}", body)
        assert status == 200 and json.loads(answer)["trouble"] and "/tmp" not in json.loads(answer)["trouble"]
    status, headers, answer = visitor.ask("POST", "/dropped/..%2F..%2Fown owl.safetensors".replace(" ", "%20"), data)
    assert (status, headers["content-type"]) == (200, "application/json") and json.loads(answer)["name"] == "own owl"
    assert "own owl" in _listed(visitor) and visitor.ask("GET", "/dropped/own%20owl.safetensors")[0] == 404
    shown, _ = visitor.picture(prompt="an owl", steps=1, loras=[{"key": "own owl", "weight": 1}])
    assert "own owl: applied" in shown


def _raw(address: str, request: bytes) -> int:
    """The status of what is answered to these bytes, which go on in vain."""
    import socket

    host, _, number = address.removeprefix("http://").strip("/").partition(":")
    with socket.create_connection((host, int(number)), timeout=30) as line:
        line.sendall(request)
        return int(line.recv(100).split()[1])


@pytest.mark.parametrize("path", [
    "/docs", "/redoc", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/runs", "/gradio_api/proxy=http://127.0.0.1/", "/monitoring",
    "/monitoring/summary", "/gradio_api/token", "/gradio_api/call/generate/x", "/gradio_api/upload_progress?upload_id=1", "/gradio_api/vibe-code",
    "/gradio_api/queue/status", "/gradio_api/deep_link?session_hash=x", "/gradio_api/mcp/sse", "/gradio_api/stream/a/b/1/playlist.m3u8",
    "/gradio_api/dev/reload", "/gradio_api/custom_component/x/client/component/index.js", "/pwa_icon", "/elsewhere/", "/gradio_api/profiling/traces",
])  # fmt: skip
def test_only_the_routes_of_the_page_are_open(visitor, path):
    assert visitor.ask("GET", path)[0] == 404 and visitor.ask("GET", "/")[0] == 200
    assert visitor.ask("GET", "/", Host="medley.example")[0] == 400
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert visitor.ask(method, "/gradio_api/queue/join")[0] in (404, 405) or method == "OPTIONS"


def test_another_sites_page_sets_no_work_going(place, visitor):
    number, _ = visitor.event("generate", "click")
    body = json.dumps({"data": [], "fn_index": number, "session_hash": visitor.client}).encode()
    for origin in ("https://elsewhere.example", "http://127.0.0.1:1", "null", "http://elsewhere.example/" + place[0]):
        assert visitor.ask("POST", "/gradio_api/queue/join", body, **{"Content-Type": "text/plain", "Origin": origin})[0] == 403
    assert visitor.ask("GET", "/config", Origin=place[0].rstrip("/"))[0] == 200


# hostile files -----------------------------------------------------------------------------------------------------------------


def _listed(visitor: Visitor) -> dict[str, dict]:
    """What a load of the page answers: the cards by key."""
    config = visitor.config()
    (load,) = [each for each in config["dependencies"] if any(target[1] == "load" for target in each["targets"])]
    body = json.dumps({"data": [], "fn_index": load["id"], "session_hash": visitor.client}).encode()
    status, _, answer = visitor.ask("POST", "/gradio_api/run/predict", body, **{"Content-Type": "application/json"})
    assert status == 200, answer
    update, *_ = json.loads(answer)["data"]
    return {card["key"]: card for card in update["props"]["cards"]}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_bad_files_are_listed_with_their_reason_and_the_page_goes_on(place, visitor):
    """Those that were there at the start, and those that are dropped in while it runs."""
    _, _, folder, engine = place
    hostile_folder(folder / "later", engine.find("owl"))
    begun = time.monotonic()
    listed = _listed(visitor)
    assert time.monotonic() - begun < 10
    for name in BAD:
        first = [card for key, card in listed.items() if key == name or key.startswith(f"{name} (")]
        assert len(first) == 2, (name, sorted(listed))
        fine = name in ("null", "numbers", "deep", "markup") or name == "closed" and os.geteuid() == 0
        assert name == "numbers" or all(bool(card["trouble"]) is not fine for card in first), first
        assert all(len(card["trouble"]) < 400 and len(card["title"]) < 1000 for card in first)
    assert "raccoon" in listed and not listed["raccoon"]["trouble"]
    assert not any("\x1b" in key for key in listed)
    visitor.picture(prompt="still here", steps=1)


def test_no_file_is_read_and_nothing_is_drawn_on_the_loop(place, visitor, monkeypatch):
    """Whatever looks at files, or draws, asks whether it runs on an event loop; and a slow folder delays no other answer."""
    on_loop, off_loop, slow = [], [], threading.Event()

    def watched(name, work):
        def run(*arguments, **more):
            try:
                asyncio.get_running_loop()
                on_loop.append(name)
            except RuntimeError:
                off_loop.append(name)
            if name == "cards" and slow.is_set():
                time.sleep(1.5)
            return work(*arguments, **more)
        return run

    monkeypatch.setattr(compose_form, "cards", watched("cards", cards.cards))
    monkeypatch.setattr(cards, "load_header", watched("header", cards.load_header))
    monkeypatch.setattr(place[3], "loras", watched("loras", place[3].loras))
    for part in ("stage", "report", "preview"):
        monkeypatch.setattr(page.job_view, part, watched(part, getattr(page.job_view, part)))
    _listed(visitor)
    visitor.picture(prompt="looked at", steps=30, size="64x64", cards=[{"key": "raccoon", "weight": 1}])
    assert on_loop == [] and {"cards", "loras", "stage", "report"} <= set(off_loop)
    slow.set()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(_listed, Visitor(place[0])), pool.submit(Visitor(place[0]).picture, prompt="slow", steps=1)]
        assert until(lambda: off_loop.count("cards") >= 4)
        begun = time.monotonic()
        assert visitor.ask("GET", "/theme.css")[0] == 200 and time.monotonic() - begun < 1.0
        slow.clear()
        for answer in waiting:
            answer.result(60)
