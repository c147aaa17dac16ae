"""What is read out of a run's log: replays, explanations, verification, forks, reports."""
