"""Of what JAX prints on a lost process, one line is left; of everything else, everything."""

import signal
import subprocess
import sys

import pytest

from hydrax.train.stderr import condensed
from tests.faults import campaign

AGENT = "E1123 02:46:08.979310    7060 coordination_service_agent.cc:289] Polled an error from coordination service.\n"
FATAL = (
    "F1123 02:46:08.979366    7060 client.h:80] Terminating process because the JAX distributed service detected fatal"
)
FATAL += " errors. This most likely indicates that another task died. absl::Status: "
NO_SERVICE = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted.\n"
NO_HEARTBEATS = (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have crashed.\n"
)
LATE = "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/{}\n"
STACK = (
    "*** Check failure stack trace: ***\n    @     0x7f5477a40634  absl::lts::log_internal::LogMessage::SendToLog()\n"
)
OTHER = "W1123 02:46:08.100000    7060 rendezvous.cc:12] This thread has been waiting for 20 seconds.\n"
OWN = "stopped: another process of the run is lost (Gloo AllGather failed); the same command continues\n"
PYTHON = "Traceback (most recent call last):\nValueError: Gloo\n"

WAIT = """
import sys, time
from hydrax.train import processes
processes.HEARTBEAT = 4
processes.join(sys.argv[1], 2, int(sys.argv[2]))
print("joined", flush=True)
time.sleep(100)
"""


def condense(*texts):
    return "".join(condensed("".join(texts).splitlines(keepends=True)))


def line(why):
    return f"stopped: another process of the run is lost ({why}); the same command continues\n"


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (NO_SERVICE, "no connection to process 0"),
        (NO_HEARTBEATS, "no heartbeats from process 1, 3"),
        (LATE.format("Heartbeat"), "no answer from process 0"),
        (LATE.format("RegisterTask"), "not all have begun"),
    ],
    ids=["connection", "heartbeats", "answer", "begin"],
)
def test_one_line_when_jax_ends_the_process(status, why):
    assert condense(OTHER, AGENT, FATAL, status, PYTHON, STACK) == OTHER + line(why)
    assert condense(AGENT, OWN, FATAL, status, STACK) == OWN  # it was about to say so itself


def test_everything_else_passes():
    assert condense(OTHER, PYTHON, "\n") == OTHER + PYTHON + "\n"
    assert condense(AGENT, OTHER, PYTHON) == OTHER + PYTHON + AGENT  # the process went on


@pytest.mark.thorough
@pytest.mark.parametrize(("who", "why"), [(0, "no connection to process 0"), (1, "no heartbeats from process 1")])
def test_a_process_that_waits_elsewhere_ends_too(who, why):
    command = [sys.executable, "-c", WAIT, f"localhost:{campaign.free_port()}"]
    both = [
        subprocess.Popen(
            [*command, str(i)], cwd=campaign.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    assert [process.stdout.readline() for process in both] == ["joined\n"] * 2
    both[who].send_signal(signal.SIGKILL)
    both[who].communicate()
    assert both[1 - who].communicate(timeout=60)[1] == line(why)
    assert both[1 - who].returncode not in (0, None)
