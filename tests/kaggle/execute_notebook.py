"""Executes a notebook from top to bottom in a process that reaches no network.

    python execute_notebook.py NOTEBOOK SETTINGS.json OUTPUT.ipynb

The cell tagged `parameters` gets the assignments of SETTINGS after it. Where the system allows it, the process is put
into a network of its own that has nothing but its own loopback (Jupyter talks over that).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import socket
import struct
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def close_network() -> None:
    """Leave every network but a loopback of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        print("the network could not be closed (needs root)")
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    except OSError as error:
        print(f"closed: {error}")


def main() -> None:
    """Execute, write what came out, and fail where a cell failed."""
    source, settings, output = map(Path, sys.argv[1:])
    close_network()
    notebook = nbformat.read(source, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            values = json.loads(settings.read_text())
            cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    client = NotebookClient(notebook, timeout=600, kernel_name="python3")
    try:
        client.execute()
    finally:
        nbformat.write(notebook, output)


if __name__ == "__main__":
    main()
