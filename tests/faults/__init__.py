"""The kill harness: real trainers and workers, killed at random moments, whose weights must never be torn or stale."""
