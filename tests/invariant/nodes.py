# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Two processes on this machine as two machines with no disk in common: each in a folder of its own, as `torchrun --nnodes 2` says."""

import os
import socket
import subprocess
import time
from pathlib import Path

from tests.cli.processes import descendants, start


LIMIT = 180  # seconds until both must have ended


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_on_nodes(commands: list[list], folder: Path, is_launched: bool = True) -> list[subprocess.CompletedProcess]:
    """
    Runs what `python ARGS` is on each of several machines. One that fails ends no other.

    Args:
        commands (`list[list]`):
            The arguments of Python on each machine. Relative paths are of its own folder.
        folder (`Path`):
            Has a folder `node-N` for each machine.
        is_launched (`bool`, *optional*, defaults to `True`):
            Whether the processes are told that they are of several. If not, the commands launch those that are.

    Returns:
        `list[subprocess.CompletedProcess]`
    """
    world = {"WORLD_SIZE": len(commands), "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = free_port()
    nodes, processes = [folder / f"node-{number}" for number in range(len(commands))], []
    for number, (node, args) in enumerate(zip(nodes, commands, strict=True)):
        node.mkdir(parents=True, exist_ok=True)
        rank = {**world, "RANK": number, "GROUP_RANK": number} if is_launched else {}
        env = os.environ | {name: str(value) for name, value in (rank | {"HF_HOME": node / "home"}).items()}
        processes.append(start(args, node / "stdout", node / "stderr", node, env))
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [number for number, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        for pid in descendants(process.pid, "none"):
            os.kill(pid, 9)
    said = ["".join((node / name).read_text() for name in ("stdout", "stderr")) for node in nodes]
    assert not late, f"{late} did not end:\n" + "\n".join(said)
    return [
        subprocess.CompletedProcess(
            args, process.exitcode, (node / "stdout").read_text(), (node / "stderr").read_text()
        )
        for args, process, node in zip(commands, processes, nodes, strict=True)
    ]
