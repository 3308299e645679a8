"""Runs `-u -m ekiden ...` in a fork of the zygote: `python -S zygote_client.py SOCKET -u -m ekiden ...`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
assert sys.argv[2:5] == ["-u", "-m", "ekiden"], sys.argv
task = {"arguments": sys.argv[5:], "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
socket.send_fds(connection, [json.dumps(task).encode()], [1, 2])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda received, _: connection.send(bytes([received])))
answer = connection.recv(64)
code = json.loads(answer) if answer else 1
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
