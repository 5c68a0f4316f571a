"""effprof train: a short real run, held against the estimate."""
from __future__ import annotations
NAME="train"; EPILOG=""
def command() -> int:
    """x"""
    return 0
