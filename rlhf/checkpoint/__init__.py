"""A run's state on the disk: folders that are whole or not there, what is in them, and when they are written."""
