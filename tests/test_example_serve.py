import asyncio
import importlib.util
import io
import os
import runpy
import struct
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.networks import LayerNormNet

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
testclient = pytest.importorskip("fastapi.testclient")

FILE = Path(__file__).parents[1] / "examples" / "serve.py"
NETWORK = ("--network", "tests.networks.LayerNormNet", "--image-size", "32")
LIMITS = ("--max-bytes", "20000", "--max-pixels", "100000")


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("example_serve", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(serve, opened):
    with client_of(serve) as client:
        yield client


def client_of(serve, *options):
    torch.manual_seed(0)
    return testclient.TestClient(serve.build(serve.parse([*NETWORK, *LIMITS, *options])))


_OPENED: list[tuple] | None = None


def _note_opened(event, arguments):
    if event == "open" and _OPENED is not None:
        _OPENED.append(arguments)


sys.addaudithook(_note_opened)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Work in an empty folder that is the one for temporary files, too; afterwards it is empty."""
    global _OPENED
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    _OPENED = []
    yield _OPENED
    found, _OPENED = _OPENED, None
    assert list(tmp_path.iterdir()) == []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    assert [path for path, mode, flags in found if flags & writing and path != os.devnull] == []


def picture(width=32, height=32, kind="PNG", seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises many pixels and has none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data = b"IDAT" + zlib.compress(bytes(10))
    body = struct.pack(">I", len(data) - 4) + data
    return start + struct.pack(">I", zlib.crc32(chunk)) + body + struct.pack(">I", zlib.crc32(data))


def test_a_good_image_is_answered_as_the_network_predicts_it(client):
    torch.manual_seed(0)
    network = LayerNormNet()
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(picture()))))
    with torch.no_grad():
        expected = network(pixels.permute(2, 0, 1)[None].float() / 255).softmax(1)[0]
    order = expected.argsort(descending=True)[:5].tolist()
    got = client.post("/predict", content=picture()).json()
    assert (got["class"], got["name"], got["version"]) == (order[0], str(order[0]), 0)
    assert got["probability"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert [each["class"] for each in got["top"]] == order
    shown = [each["probability"] for each in got["top"]]
    assert shown == pytest.approx(expected[order].tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_each_format_is_read(client, kind):
    answer = client.post("/predict", content=picture(60, 40, kind))
    assert answer.status_code == 200
    assert len(answer.json()["top"]) == 5


def test_the_answer_says_which_image_it_is_about(serve, opened):
    bodies = [picture(seed=seed) for seed in range(40)]
    with client_of(serve) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: client.post("/predict", content=body).json(), bodies))
    assert [answer["sha256"] for answer in answers] == [sha256(body).hexdigest() for body in bodies]
    assert sorted(answer["version"] for answer in answers) == list(range(40))


BAD = {
    "zero bytes": (b"", 415),
    "text": (b"hello", 415),
    "a path": (b"/etc/passwd", 415),
    "a path upwards": (b"../../secret.png", 415),
    "a NUL": (b"\x00/etc/passwd\x00.png", 415),
    "cut off": (picture(kind="JPEG")[:700], 415),
    "cut off PNG": (picture()[:1000], 415),
    "start of a PNG": (picture()[:10], 415),
    "flipped bytes": (picture()[:60] + b"\xff" * 40 + picture()[100:], 415),
    "GIF": (picture(kind="GIF"), 415),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", 415),
    "TIFF": (picture(kind="TIFF"), 415),
    "bomb": (png_header(50_000, 50_000), 413),
    "bomb beyond Pillow's own limit": (png_header(12_000, 12_000), 413),
    "over the limit": (png_header(400, 251), 413),
    "a line": (picture(1, 5000), 413),  # would become 32 by 160,000
    "too many bytes": (picture(100, 100), 413),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_usable_image_is_refused_and_teaches_nothing(client, opened, name):
    body, status = BAD[name]
    answer = client.post("/predict", content=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"detail"}
    assert client.get("/statistics").json()["predictions"] == 0
    assert not [path for path, *_ in opened if "passwd" in str(path) or "secret" in str(path)]
    assert client.post("/predict", content=picture()).status_code == 200


@pytest.mark.parametrize("announced", [None, "10", "0"])
def test_a_body_is_read_up_to_the_limit_only_whatever_its_header_says(client, announced):
    status, read = call(client.app, announced, [bytes(5000)] * 100)
    assert status == 413
    assert read == 5  # 25,000 bytes, the limit being 20,000


@pytest.mark.parametrize("announced", ["20001", "9" * 5000, "-1", "ten", "1e3"])
def test_a_body_that_announces_too_much_is_not_read(client, announced):
    assert call(client.app, announced, [bytes(5000)] * 100) == (413, 0)


def test_a_body_in_pieces_is_put_together(client):
    body = picture()
    pieces = [body[:7], b"", body[7:1000], body[1000:]]
    assert call(client.app, None, pieces) == (200, 4)


def test_a_client_that_goes_away_is_no_error(client):
    assert call(client.app, "5000", [bytes(10)], leaves=True)[0] == 400


def call(app, announced, pieces, leaves=False):
    """Post a body in pieces; returns the status and how many of them were read."""
    headers = [] if announced is None else [(b"content-length", announced.encode())]
    scope = {
        **{"type": "http", "method": "POST", "path": "/predict", "headers": headers},
        **{"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""},
    }
    left, sent = list(pieces), []

    async def receive():
        if not left:
            return {"type": "http.disconnect"}
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left) or leaves}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], len(pieces) - len(left)


def test_versions_move_when_the_model_adapts(client):
    for _ in range(3):
        client.post("/predict", content=picture())
    assert client.get("/health").json() == {"status": "ok", "adapting": True}
    statistics = client.get("/statistics").json()
    assert statistics["updates"] == statistics["version"] == statistics["images"] == 3


def test_without_adaptation_the_answer_stays(serve, opened):
    with client_of(serve, "--no-adapt") as client:
        answers = [client.post("/predict", content=picture()).json() for _ in range(3)]
        assert client.get("/health").json()["adapting"] is False
    assert answers[0] == answers[2]
    assert answers[0]["version"] == 0


def test_updates_in_the_background(serve, opened):
    options = ("--updates", "background", "--update-size", "4", "--method", "Tent", "--lr", "0.01")
    with client_of(serve, *options) as client:
        for seed in range(9):
            assert client.post("/predict", content=picture(seed=seed)).status_code == 200
    # the server is closed, so its updates are made or dropped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "tests.networks.LayerNormNet"], "give --image-size"),
        ([*NETWORK, "--method", "Tenet"], "Did you mean 'Tent'"),
        ([*NETWORK, "--method", "EATA"], "needs clean images"),
        ([*NETWORK, "--method", "T3A", "--lr", "0.1"], "leave out --lr"),
        (["--network", "timm:resnet5"], "Unknown timm model"),
    ],
)
def test_arguments_that_cannot_be_end_with_a_sentence(serve, arguments, message):
    with pytest.raises(SystemExit, match=message):
        serve.main(arguments)


def test_without_fastapi_the_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit, match=r"Run: pip install 'tta_lightning\[serve\]'"):
        runpy.run_path(str(FILE))
