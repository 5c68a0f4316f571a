"""The signals that end a run or a bench with everything kept, and the exit code of each.

Not in errors.py: where there is no SIGUSR1 estimates have to work all the same.
"""

from __future__ import annotations

import signal

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
