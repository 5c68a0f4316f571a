"""Methods held against each other by training: a spec, a resumable study, and what it shows."""
