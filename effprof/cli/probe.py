"""effprof probe: a short real run, held against the estimate."""
from __future__ import annotations
NAME="probe"; EPILOG=""
def command() -> int:
    """x"""
    return 0
