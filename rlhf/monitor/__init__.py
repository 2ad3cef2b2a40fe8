"""What a run shows of itself while it goes on: numbers, alarms, status, and where they go."""
