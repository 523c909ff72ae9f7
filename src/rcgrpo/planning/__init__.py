"""What a run will take, before anything is downloaded: memory by phase, FLOP, time."""
