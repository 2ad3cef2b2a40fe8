"""What comes before RL: a supervised warm-up and a reward model."""
