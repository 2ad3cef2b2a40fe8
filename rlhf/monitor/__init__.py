"""What a run shows of itself while it goes on: numbers, alarms, status, and where they go.

Nothing here changes a number of the run; what runs have left behind is read by reports/.
"""
