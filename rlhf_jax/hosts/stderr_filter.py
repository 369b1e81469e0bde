"""A program between a process's C++ and the user: passes lines on, and says in one what JAX ends a process for.

JAX aborts a process with a stack trace where process 0 of its run is gone, and lets no Python run then.
"""

import re
import sys
import time

# What JAX's coordination writes, and the lines that belong to it.
COORDINATION = re.compile(r"[IWEF]\d{4} \S+ +\d+ (client\.h|(coordination|preemption|distributed)\w*\.(cc|h)):\d+\]")
MORE = re.compile(r"\s*$|RPC: |Additional GRPC error|:UNKNOWN:|\*\*\* Check failure|    @ |\[Gloo\] Rank ")
FATAL = "Terminating process because the JAX distributed service detected fatal errors"


def verdict(text: str, name: str, address: str, start_timeout: int, peer_timeout: int, now: float) -> str:
    """The one line for JAX's last words, at `now` in seconds since the epoch."""

    def clock(seconds: float) -> str:
        return time.strftime("%H:%M:%S", time.localtime(seconds))

    if "RegisterTask" in text:
        return f"{name}: not all processes came to {address} within {start_timeout} s; the others' messages say why"
    if "DEADLINE_EXCEEDED" in text:
        what = f"has not answered for {peer_timeout} s, since {clock(now - peer_timeout)}"
    else:
        what = f"is gone since {clock(now)}"
    return f"{name}: process 0, at {address}, {what}; the same command on all hosts goes on"


def main(name: str, address: str, start_timeout: str, peer_timeout: str) -> None:
    """Filter stdin to stderr until the process that writes it has ended."""
    last_words = ""
    for line in iter(sys.stdin.buffer.readline, b""):
        text = line.decode(errors="replace")
        if FATAL in text or (last_words and MORE.match(text)):
            last_words += text
        elif not COORDINATION.match(text) and not MORE.match(text):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    if last_words:
        line = verdict(last_words, name, address, int(start_timeout), int(peer_timeout), time.time())
        print(f"error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
