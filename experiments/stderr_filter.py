"""Between one of several processes and its stderr: `python stderr_filter.py < what it says`.

A process that loses another is aborted by XLA, which says so in a page of its own and leaves
nothing that could say it better. This process, which outlives it, says it in a line.
"""

import re
import signal
import sys

GREETING = re.compile(r"\[Gloo\] Rank \d+ is connected to ")

SERVICE = re.compile(
    r"\] .*coordination service|coordination_service|JAX distributed service|Failed to add port"
)
"""Begins what XLA says of a lost process; the rest of its page follows."""

RUN = "all processes to run; see what it said, then start the same command on all hosts again"
START = "start the same command on all hosts, or have VFJAX_INITIALIZATION_TIMEOUT wait longer"
ALIVE = f"process {{}}: found no sign of life, expected {RUN}"

LINES = {
    r"stopped sending heartbeats\):\s+(\d+)": ALIVE,
    r"Task (\d+) heartbeat timeout": ALIVE,
    r"leader task was preempted": ALIVE.format(0),
    r"(?s)Wait_for_all_tasks_to_register.*?timed out task names:((?:\s+\d+)+)": (
        f"process {{}}: found no start in time, expected all processes to start; {START}"
    ),
    r"DEADLINE_EXCEEDED: Deadline Exceeded\s+RPC: \S+/RegisterTask": (
        f"process 0: found no word from it that all have started, expected it in time; {START}"
    ),
    r"Failed to add port to server: .* resolved for '(.*)'": (
        "JAX_COORDINATOR_ADDRESS: found {}, which process 0 cannot listen at, expected a free "
        "port; choose another"
    ),
}
"""What the pages have, with the processes' numbers or an address in it, and what is said instead.
"""


def main() -> None:
    """Passes lines on as they come; from what XLA says of a lost process on, makes one of all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process ends by them, and this one after it
    page = ""
    for line in sys.stdin:
        if page or SERVICE.search(line):
            page += line
        elif not GREETING.match(line):
            print(line, end="", file=sys.stderr, flush=True)
    print(summary(page), end="", file=sys.stderr, flush=True)


def summary(page: str) -> str:
    """The page in one line; as it is if it has nothing that is known."""
    for pattern, line in LINES.items():
        if match := re.search(pattern, page):
            found = sorted(set("".join(match.groups()).split()), key=lambda x: (len(x), x))
            return line.format(", ".join(found)) + "\n"
    return page


if __name__ == "__main__":
    main()
