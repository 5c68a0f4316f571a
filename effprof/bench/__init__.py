"""Methods held against each other by training: a spec, a resumable study, and what it shows."""

JOURNAL = "journal.log"  # Optuna's: every trial with what it left
DOCUMENT = "bench.json"  # what `effprof bench --json` prints, after every trial
