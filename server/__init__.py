"""What the coordinator runs: the ServerApp, its rounds, checkpoints, the run record and the report."""
