"""Nothing leaves the machine: a guard that refuses every connection and look-up beyond the loopback interface.

Python cannot open a connection without raising an audit event first, whatever the library, so the guard needs no
patches and knows nothing about requests, httpx or the Hub. A refused attempt is an OSError for the caller, is kept in
ATTEMPTS and is printed on stderr, where the harness of the browser tests looks for it in the server's log.
"""

import os
import runpy
import sys

MARK = "offline guard:"
ATTEMPTS: list[str] = []
_LOCAL = {"", "localhost", "127.0.0.1", "0.0.0.0", "::1", "::"}
_installed = False


class Offline(OSError):
    """A connection or a look-up that would have left the machine."""


def _audit(event: str, args: tuple) -> None:
    if event == "socket.connect":
        address = args[1]
        if isinstance(address, str | bytes):  # a Unix socket
            return
        host = address[0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host or ""
    if host in _LOCAL or host.startswith("127.") or host == os.uname().nodename:
        return
    attempt = f"{event} {host}"
    ATTEMPTS.append(attempt)
    print(MARK, attempt, file=sys.stderr, flush=True)
    raise Offline(f"{attempt}: tests and the app do without the network")


def guard() -> None:
    """Refuse the network in this process from now on. An audit hook cannot be taken out again."""
    global _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_audit)


if __name__ == "__main__":  # python -m tests.offline MODULE ARGS...: python -m MODULE ARGS... under the guard
    guard()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
