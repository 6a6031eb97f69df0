"""Between one of several processes and its stderr: `python relay.py < what it says`.

A process that loses another is aborted by XLA, which says so in a page of its own and leaves
nothing that could say it better. This process, which outlives it, says it in a line.
"""

import re
import signal
import sys

GREETING = re.compile(r"\[Gloo\] Rank \d+ is connected to ")

SERVICE = re.compile(r"\] .*coordination service|coordination_service|JAX distributed service")
"""Begins what XLA says of a lost process; the rest of its page follows."""

LOST = (
    re.compile(r"stopped sending heartbeats\):\s+(\d+)"),
    re.compile(r"Task (\d+) heartbeat timeout"),
    re.compile(r"(leader) task was preempted"),
)
"""How it names the process; the leader is process 0."""


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
    """The page in one line; as it is if it names no process."""
    found = next((match[1] for pattern in LOST if (match := pattern.search(page))), None)
    if found is None:
        return page
    return (
        f"process {found.replace('leader', '0')}: found no sign of life, expected all processes "
        "to run; see what it said, then start the same command on all hosts again\n"
    )


if __name__ == "__main__":
    main()
