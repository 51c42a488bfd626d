"""The rating server as a process of its own, to be killed: a fork of this one, for importing torch anew takes its time."""

import json
import multiprocessing
import signal
import socket
import sys
import time
from argparse import Namespace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

from sdcore.train import rate
from sdcore.train.labels import home


def options(run: Path, **changed) -> Namespace:
    """The words of `sdcore rate RUN`."""
    words = {
        "folder": str(run),
        "pairs": None,
        "prompts": "world:two",
        "model": "tiny",
        "steps": 1,
        "guidance": 3.0,
        "seed": 0,
    }
    return Namespace(**words | {"pictures": None, "port": None} | changed)


def start(run: Path) -> BaseProcess:
    """`sdcore rate RUN`; what it prints goes to out.txt and err.txt in the run's folder."""
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(run,))
    process.start()
    return process


def _serve(run: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(run / "out.txt", "w") as sys.stdout, open(run / "err.txt", "w") as sys.stderr:
        rate.rate(options(run))


def address(run: Path, process: BaseProcess, seconds: float = 60) -> SimpleNamespace:
    """Port, token and address of the server once it answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        try:
            found = SimpleNamespace(**json.loads((home(run) / "address.json").read_text()))
            socket.create_connection(("127.0.0.1", found.port), 1).close()
            return SimpleNamespace(server_port=found.port, token=found.token, address=found.address, run=run)
        except (OSError, ValueError):
            time.sleep(0.02)
    raise AssertionError(f"no server: {(run / 'err.txt').read_text()}")
