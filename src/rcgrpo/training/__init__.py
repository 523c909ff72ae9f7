"""The trainer: settings, the loop on TRL's base trainer, checkpoints, the Hub, what a run shows while it trains."""
