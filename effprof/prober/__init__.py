"""Probes: a plan's step run for real in a child process and held against its estimate."""
