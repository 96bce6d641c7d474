"""Whether `examples/serve.py` loses an answer, gives a wrong one, or grows, under load on loopback.

Clients post digits as PNG files and check every answer:

* Each names the SHA-256 of the bytes that were sent, so it is about that image.
* Without adaptation, or with ``--lr 0`` (everything runs, nothing moves), its five probabilities
  are those that were computed beforehand, in this process, from the pixels.
* With adaptation in line it names a version of the weights. Afterwards the updates are replayed
  here, by ``adapt_step`` in a bare loop in the order of the versions, and every answer is compared
  with the prediction of its version. Each version must have been seen, so no update was lost.
* With adaptation in the background only sizes, order and range of the probabilities are checked,
  as which images a version has learnt from is not known.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tta_lightning import Adapter, load_model
from tta_lightning.data import Digits
from tta_lightning.methods import Tent
from tta_lightning.rules import SGD

SERVER = Path(__file__).parents[1] / "examples" / "serve.py"
IMAGES = 200  # of the test digits
PATIENCE = 30.0  # seconds until a request counts as lost
TOLERANCE = 1e-4  # of a probability
LIMIT = 0.02  # relative growth of the resident memory after a tenth of the time
SIDE = 32  # px


class Question(NamedTuple):
    """An image as a client sends it, and as the network sees it."""

    body: bytes
    sha256: str
    pixels: Tensor


class Reply(NamedTuple):
    """One good answer."""

    version: int
    question: int
    classes: list[int]
    probabilities: list[float]


class Log:
    """What the clients saw; shared by their threads."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.seconds: list[float] = []
        self.lost: list[str] = []
        self.wrong: list[str] = []


def make_questions() -> list[Question]:
    """Encode digits without loss."""
    digits, questions = Digits("test"), []
    for index in range(0, len(digits), len(digits) // IMAGES):
        pixels, file = digits.load(index), io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        body = file.getvalue()
        questions.append(Question(body, hashlib.sha256(body).hexdigest(), images))
    return questions


def make_adapter(network: str, lr: float | None) -> Adapter:
    """Make what the server makes of the same options."""
    loaded = load_model(network)
    return Tent(loaded) if lr is None else Tent(loaded, SGD(lr, momentum=0.9))


def free_port() -> int:
    """Ask the system for a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Start the server; gives its port and its process id, and ends it afterwards."""
    port = free_port()
    command = [sys.executable, SERVER, "--network", options.network, "--port", str(port)]
    command += ["--image-size", str(SIDE), "--threads", "1", "--updates", options.updates]
    command += ["--no-adapt"] if options.adapt == "off" else []
    command += [] if options.lr is None else ["--lr", str(options.lr)]
    command += [] if options.update_size is None else ["--update-size", str(options.update_size)]
    process = subprocess.Popen([str(part) for part in command])
    try:
        deadline = time.monotonic() + 120
        while not is_up(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("error: the server did not start; see its message above")
            time.sleep(0.2)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def is_up(port: int) -> bool:
    """Ask whether the server answers."""
    try:
        return bool(get(port, "/health")["status"] == "ok")
    except OSError:
        return False


def get(port: int, path: str) -> dict[str, Any]:
    """Fetch a JSON document."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        document: dict[str, Any] = json.loads(connection.getresponse().read())
        return document
    finally:
        connection.close()


def ask(port: int, questions: list[Question], seed: int, end: float, log: Log) -> None:
    """Be one client: ask one question after the other until the end."""
    rng = np.random.default_rng(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    while time.monotonic() < end:
        number = int(rng.integers(len(questions)))
        start = time.perf_counter()
        try:
            connection.request("POST", "/predict", body=questions[number].body)
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            log.lost.append(repr(error))
            connection.close()
            time.sleep(0.1)  # where the server is gone
            continue
        log.seconds.append(time.perf_counter() - start)
        if response.status != 200:
            log.lost.append(f"{response.status} {text[:200]!r}")
            continue
        note(json.loads(text), number, questions[number], log)


def note(answer: dict[str, Any], number: int, question: Question, log: Log) -> None:
    """Check what can be checked at once, and keep the rest."""
    classes = [each["class"] for each in answer["top"]]
    values = [each["probability"] for each in answer["top"]]
    sorted_ = values == sorted(values, reverse=True) and len(set(classes)) == 5
    possible = values[-1] >= 0 and sum(values) <= 1 + TOLERANCE
    first = (answer["class"], answer["probability"]) == (classes[0], values[0])
    if not (sorted_ and possible and first and answer["sha256"] == question.sha256):
        log.wrong.append(json.dumps(answer))
    log.replies.append(Reply(answer["version"], number, classes, values))


def deviation(reply: Reply, logits: Tensor) -> float:
    """Return how far an answer is from a prediction ``[1, C]``, by the largest difference."""
    expected = logits[0].softmax(0)
    given = torch.tensor(reply.probabilities)
    highest = expected.topk(len(given)).values
    apart = (given - expected[reply.classes]).abs().max(), (given - highest).abs().max()
    return max(float(value) for value in apart)


def compare(options: argparse.Namespace, questions: list[Question], log: Log) -> dict[str, Any]:
    """Compare all answers with predictions that are made here; see the top of this file."""
    adapter = make_adapter(options.network, options.lr)
    still = options.adapt == "off" or options.lr == 0
    if still:
        with torch.no_grad():
            known = [adapter(question.pixels) for question in questions]
        found = [deviation(reply, known[reply.question]) for reply in log.replies]
    elif options.updates == "inline":
        found = replay(adapter, options.update_size, questions, log)
    else:
        return {"compared": 0}
    wrong = [value for value in found if not value <= TOLERANCE]
    log.wrong += [f"{value:g} from what was expected" for value in wrong]
    return {"compared": len(found), "largest_deviation": max(found, default=0.0)}


def replay(
    adapter: Adapter, update_size: int | None, questions: list[Question], log: Log
) -> list[float]:
    """Make the updates again, in the order of the versions; returns all deviations."""
    found = []
    replies = sorted(log.replies, key=lambda reply: reply.version)
    for expected, (version, same) in enumerate(groupby(replies, lambda reply: reply.version)):
        group = list(same)
        if version != expected:
            log.wrong.append(f"version {expected} was never seen")
            break
        images = [questions[reply.question].pixels for reply in group]
        if update_size is None:
            logits = [adapter.adapt_step(image) for image in images]
        else:
            with torch.no_grad():
                logits = [adapter(image) for image in images]
            if len(images) == update_size:
                adapter.adapt_step(torch.cat(images))
        found += [deviation(*pair) for pair in zip(group, logits, strict=True)]
    return found


def resident_mib(pid: int) -> float:
    """Return the memory of a process that is in RAM now, in MiB; Linux only."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load the server for as long as asked; returns the figures."""
    questions, log, resident = make_questions(), Log(), []
    with running_server(options) as (port, pid):
        start = time.monotonic()
        seconds = 60 * options.minutes
        clients = [
            threading.Thread(target=ask, args=(port, questions, seed, start + seconds, log))
            for seed in range(options.clients)
        ]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            resident.append((time.monotonic() - start, resident_mib(pid)))
            time.sleep(min(1.0, seconds / 60))
        took = time.monotonic() - start
        statistics = get(port, "/statistics")
    checked = compare(options, questions, log)
    late = np.array([pair for pair in resident if pair[0] >= seconds / 10])
    p50, p99 = np.percentile(np.array(log.seconds) * 1000, [50, 99])
    if statistics["predictions"] != len(log.replies):
        log.lost.append(f"the server counts {statistics['predictions']} predictions")
    return {
        "adapt": options.adapt,
        "updates": options.updates,
        "update_size": options.update_size,
        "lr": options.lr,
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": len(log.replies) + len(log.lost),
        "requests_per_second": len(log.replies) / took,
        "lost": len(log.lost),
        "wrong": len(log.wrong),
        **checked,
        "p50_ms": p50,
        "p99_ms": p99,
        "resident_mib_at_10_percent": late[0, 1],
        "resident_mib_at_the_end": late[-1, 1],
        "growth_mib_per_minute": float(np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0]),
        "flat": bool(abs(late[-1, 1] / late[0, 1] - 1) <= LIMIT),
        "server": statistics,
        "examples_of_what_went_wrong": (log.lost + log.wrong)[:5],
    }


def main() -> None:
    """Run once, print a table, and append a line of JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", help="a checkpoint that knows digits, with group normalisation")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--adapt", choices=["on", "off"], default="on")
    parser.add_argument("--lr", type=float, help="learning rate of Tent; default: its own")
    parser.add_argument("--updates", choices=["inline", "background"], default="inline")
    parser.add_argument("--update-size", type=int, help="images an update; default: one request")
    parser.add_argument("--output", type=Path, help="file that a line of JSON is appended to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = run(options)
    table = Table("figure", "value", title="load on loopback")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.output is not None:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    sys.exit(bool(figures["lost"] or figures["wrong"] or not figures["flat"]))


if __name__ == "__main__":
    main()
