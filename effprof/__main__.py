"""python -m effprof, and the effprof command: one error boundary around every command."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line.

    Errors a user can cause end in one sentence, a hint and their exit code.
    """
    gc.disable()  # imports make no garbage; collecting while they run is a tenth of a short command
    try:
        from effprof.cli import run
    except KeyboardInterrupt:
        sys.exit(130)
    if sys.argv[1:2] != ["estimate"]:  # which imports more, and ends before it mattered
        gc.enable()
    code = run(sys.argv[1:])
    gc.freeze()  # nor is there anything to collect when the interpreter ends
    sys.exit(code)


if __name__ == "__main__":
    main()
