"""A training survives: checkpoints and resumption, signals, poisoned steps."""
