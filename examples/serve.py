"""A server that answers with a network which learns from what it is asked.

  python examples/serve.py --network model.ckpt --method Tent --update-size 16
  curl --data-binary @cat.jpg http://127.0.0.1:8000/predict

POST /predict takes the bytes of one JPEG, PNG, WebP or BMP file. GET /health and GET /statistics
say how it goes. Nothing that a client sends is written to disk. Whoever can reach the server can
teach its model, and whoever opens 64 connections keeps all others out: do not expose it to people
you do not trust, and put a reverse proxy in front of it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import inspect
import io
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tta_lightning import Adapter, InputError, load_model, methods
from tta_lightning.data import BadImageError
from tta_lightning.data.geometry import Geometry, geometry
from tta_lightning.data.images import read_image
from tta_lightning.errors import unknown_name
from tta_lightning.models import describe
from tta_lightning.rules import SGD
from tta_lightning.serving import OnlineClassifier

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise SystemExit(f"error: {error}. Run: pip install 'tta_lightning[serve]'") from error

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # decoders that need no other program and no file
CONNECTIONS = 64  # at a time; each may hold a body in memory
PATIENCE = 30.0  # seconds for a body
SCANS = 100  # of a JPEG, each a pass over all pixels; a camera writes up to a dozen


@dataclass(frozen=True)
class Reader:
    """Turns the bytes of a client into an image of the network's size, in memory.

    Attributes:
        geometry: What images are resized and cropped to.
        max_pixels: Of the image, and of what it is resized to before the crop.
    """

    geometry: Geometry
    max_pixels: int
    one_at_a_time: threading.Lock  # so that memory is that of one decoded image

    def __call__(self, body: bytes) -> torch.Tensor:
        """Decode ``[1, 3, S, S]`` in [0, 1]; raises HTTPException 413 or 415."""
        with self.one_at_a_time:
            self.check_header(body)
            try:
                pixels = self.geometry(read_image(io.BytesIO(body)))
            except BadImageError:
                raise HTTPException(415, "The image is damaged or cut off.") from None
        return as_batch(pixels)

    def check_header(self, body: bytes) -> None:
        """Refuse what is no image, or takes too long to decode, before a pixel is decoded."""
        if body.startswith(b"\xff\xd8") and body.count(b"\xff\xda") > SCANS:
            raise HTTPException(415, f"The JPEG has over {SCANS} scans.")
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                short, long = sorted(image.size)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            short = long = self.max_pixels
        except Exception:  # on damaged bytes a decoder raises whatever it stumbles upon
            raise HTTPException(415, f"Expected an image: {', '.join(FORMATS)}.") from None
        side = round((self.geometry.size or 1) / self.geometry.crop_pct)
        if max(short * long, side * side * long / max(1, short)) > self.max_pixels:
            raise HTTPException(413, f"The image has, or would have, over {self.max_pixels} px.")


def as_batch(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Bring ``[H, W, 3]`` to ``[1, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255)


def make_app(classifier: OnlineClassifier, names: list[str], reader: Reader, max_bytes: int) -> Any:
    """Make the application: three ways in, and an end at which the classifier is closed."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        classifier.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def answer(body: bytes) -> dict[str, Any]:
        result = classifier.answer(reader(body))
        row = result.probabilities[0]
        if not row.isfinite().all():
            raise HTTPException(500, "The network gave numbers that are not finite.")
        best, places = (values.tolist() for values in row.topk(min(5, len(row))))
        top = [
            {"class": place, "name": names[place], "probability": probability}
            for place, probability in zip(places, best, strict=True)
        ]
        digest = hashlib.sha256(body).hexdigest()  # tells which image the answer is about
        return {**top[0], "top": top, "version": result.version, "sha256": digest}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        if "origin" in request.headers:  # any page in the browser of a user could teach the model
            raise HTTPException(403, "Not from a web page.")
        return await run_in_threadpool(answer, await read_body(request, max_bytes))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "adapting": classifier.adapting}

    @app.get("/statistics")
    async def statistics() -> dict[str, int]:
        return asdict(classifier.statistics)

    return app


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body into memory, and no more of it than allowed, whatever its header says."""
    announced = request.headers.get("content-length", "0")
    body = bytearray()
    if announced.isdecimal() and len(announced) < 20 and int(announced) <= max_bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        break
                else:
                    return bytes(body)
        except ClientDisconnect:
            raise HTTPException(400, "The body is not complete.") from None
        except TimeoutError:
            raise HTTPException(408, f"The body took over {PATIENCE:.0f} s.") from None
    raise HTTPException(413, f"The body has more than {max_bytes} bytes.")


def make_adapter(options: argparse.Namespace) -> Adapter:
    """Build the method that was asked for, on the network that was asked for."""
    if options.method not in methods.__all__:
        raise unknown_name("method", options.method, methods.__all__)
    method: type[Adapter] = getattr(methods, options.method)
    if method.prepare is not Adapter.prepare:
        raise InputError(f"{options.method} needs clean images first: serve another method.")
    has_rule = "rule" in inspect.signature(method).parameters
    if options.lr is not None and not has_rule:
        raise InputError(f"{options.method} takes no learning rate: leave out --lr.")
    network = load_model(options.network).to(options.device)
    if options.lr is None:
        return method(network)
    return method(network, rule=SGD(options.lr, momentum=0.9))


def build(options: argparse.Namespace) -> Any:
    """Build the application from the options of the command line."""
    adapter = make_adapter(options)
    info = describe(adapter.network)
    if options.max_pixels > (Image.MAX_IMAGE_PIXELS or 0):
        raise InputError(f"--max-pixels is at most {Image.MAX_IMAGE_PIXELS}, Pillow's own limit.")
    size = options.image_size or info.input_size
    if size is None:
        raise InputError("The network does not say its size of images: give --image-size.")
    classifier = OnlineClassifier(adapter, options.updates, options.update_size)
    classifier.adapting = options.adapt
    fitting = geometry(size, None, size, info.crop_pct, info.interpolation)
    reader = Reader(fitting, options.max_pixels, threading.Lock())
    with torch.no_grad():  # names where the network has none, and an early end if it cannot run
        classes = adapter(as_batch(np.zeros((size, size, 3), np.uint8)).to(options.device)).shape[1]
    names = list(info.class_names or map(str, range(classes)))
    return make_app(classifier, names, reader, options.max_bytes)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", required=True, help="timm:NAME, or a checkpoint of tta fit")
    parser.add_argument("--method", default="Tent", help="a method of tta_lightning.methods")
    parser.add_argument("--lr", type=float, help="learning rate of SGD; default: the method's rule")
    parser.add_argument("--no-adapt", dest="adapt", action="store_false", help="only predict")
    parser.add_argument("--updates", default="inline", choices=["inline", "background"])
    parser.add_argument("--update-size", type=int, help="images an update; default: one request")
    parser.add_argument("--image-size", type=int, help="side in px; default: the network's own")
    parser.add_argument("--max-bytes", type=int, default=5_000_000, help="of a body")
    parser.add_argument("--max-pixels", type=int, default=20_000_000, help="of an image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        app = build(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=10,
        server_header=False,
    )


if __name__ == "__main__":
    main()
