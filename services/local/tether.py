"""Runs a command that dies with whoever started it: `python -I -S tether.py PARENT_PID command …`.

The kernel sends the command SIGKILL when the thread that started it ends, however it ends, so nothing is left behind
even by a parent that was killed with -9. This is a program of its own, and not code between fork and exec in the
parent, because that is unsafe in a parent with threads. It imports nothing but the standard library's smallest parts.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, then becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit("the parent ended before the command began")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
