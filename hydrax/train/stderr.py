"""The stderr of one of several processes: when another one is lost, one line.

JAX's coordination service notices a lost process, since its heartbeats end or the connection to process 0 breaks, and
aborts all others, whatever they wait for. It does so in C++, within milliseconds, without a call of Python, and prints
a page about it. What prints one line instead must outlive that: a small process, which reads stderr, passes it on, and
holds back what the service says until it knows how the run ended.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

STOPPED = "stopped: "
"""Begins the line with which a process of a run ends by itself."""

LOST = STOPPED + "another process of the run is lost{why}; the same command continues\n"

HEADER = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ (\w+)\.\w+:\d+\] ")
"""How C++ begins a message; group 1 is the source file."""

SOURCES = ("client", "coordination_service", "coordination_service_agent", "preemption_sync_manager")
"""The files that speak of lost processes."""

ABORTED = "JAX distributed service detected fatal errors"

REASONS = {
    r"stopped sending heartbeats\):\s+(\d+(?:\s+\d+)*)\s": "no heartbeats from process {}",
    r"Failed to send RPC to coordination service": "no connection to process 0",
    r"DEADLINE_EXCEEDED[^/]+/xla.coordination.CoordinationService/Heartbeat": "no answer from process 0",
    r"DEADLINE_EXCEEDED[^/]+/xla.coordination.CoordinationService/RegisterTask": "not all have begun",
}
"""What the service gives as the reason, and what the line says."""


def condense() -> None:
    """Begins to pass on the stderr of this process."""
    command = [sys.executable, "-I", "-S", __file__]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    reader.returncode = 0  # nobody waits for it: it ends after this process


def condensed(lines: Iterable[str]) -> Iterator[str]:
    """The lines, with one in place of what the coordination service says before it aborts the process.

    A message goes on to the next header. If the process goes on too, or ends otherwise, nothing is left out; if it had
    ended itself in a line of its own, that line is enough.
    """
    held: list[str] = []
    holding = said = False
    for line in lines:
        if header := HEADER.match(line):
            holding = header[1] in SOURCES
        elif line.startswith(STOPPED):
            holding, said = False, True
        if holding:
            held.append(line)
        else:
            yield line
    text = "".join(held)
    if ABORTED not in text:
        yield from () if said else held
    elif not said:
        found = ((re.search(pattern, text), why) for pattern, why in REASONS.items())
        whys = [why.format(", ".join(" ".join(match.groups()).split())) for match, why in found if match]
        yield LOST.format(why=f" ({whys[0]})" if whys else "")


def main() -> None:
    """Passes stdin on to stderr, condensed, until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the process whose stderr this is
    for line in condensed(open(0, encoding="utf-8", errors="replace")):  # noqa: SIM115
        sys.stderr.write(line)
        sys.stderr.flush()


if __name__ == "__main__":
    main()
