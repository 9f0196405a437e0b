"""The guard that keeps tests and the tested server off the network."""

import socket
import subprocess
import sys

import pytest

from tests import offline


@pytest.fixture
def attempts():
    before = len(offline.ATTEMPTS)
    yield lambda: offline.ATTEMPTS[before:]
    del offline.ATTEMPTS[before:]


def test_look_ups_and_connections_are_refused(attempts) -> None:
    with pytest.raises(offline.Offline):
        socket.getaddrinfo("example.invalid", 443)
    with socket.socket() as probe, pytest.raises(offline.Offline):
        probe.connect(("192.0.2.1", 443))  # TEST-NET-1: reserved for documentation
    assert attempts() == ["socket.getaddrinfo example.invalid", "socket.connect 192.0.2.1"]


def test_the_machine_itself_is_reachable(attempts) -> None:
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(("localhost", listener.getsockname()[1]))
    assert attempts() == []


def test_a_module_run_under_the_guard_tells_on_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.offline", "http.server", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--bind" in done.stdout, done.stderr
    code = (
        "from tests import offline; offline.guard(); import socket; socket.create_connection(('example.invalid', 80))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{offline.MARK} socket.getaddrinfo example.invalid" in done.stderr
