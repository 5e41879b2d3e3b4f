"""What outlives a process: checkpoints, and the model that a run exports."""
