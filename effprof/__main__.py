"""python -m effprof, and the effprof command: one error boundary around every command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors a user can cause end in one sentence, a hint and their exit code."""
    from effprof.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
