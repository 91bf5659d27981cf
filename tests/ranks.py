"""Two processes of torch.distributed (gloo) that run functions of tests, started once for all tests of a file."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD, SECONDS = 2, 120


def _serve(rank: int, store: str, connection: Connection) -> None:
    """Runs what comes over the connection, until it is closed."""
    torch.set_num_threads(1)
    files = dist.FileStore(store, WORLD)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            break
        try:
            connection.send((True, function(rank, *args)))
        except BaseException:  # pytest.fail is no Exception
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Starts the processes at the first call, and anew after a failure: then one may wait for the other forever."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank, *args) on each rank -> the results by rank; both have to be importable and picklable."""
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results: dict[Connection, Any] = {}
        while len(results) < WORLD:
            ready = wait([c for c in self.connections if c not in results], timeout=SECONDS)
            answers = [(connection, connection.recv()) for connection in ready]
            failures = [text for _, (succeeded, text) in answers if not succeeded]
            if failures or not ready:
                self.stop(kill=True)
                raise AssertionError(failures[0] if failures else f"no answer from a rank within {SECONDS} s")
            results.update({connection: value for connection, (_, value) in answers})
        return [results[connection] for connection in self.connections]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = self.folder / f"store{self.started}"
        self.started += 1
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def stop(self, kill: bool = False) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            if kill:
                process.kill()
            process.join()
        self.connections, self.processes = [], []
