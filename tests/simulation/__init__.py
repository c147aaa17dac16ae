"""Whole runs on one event loop with virtual time: seeded schedules of steps, faults and machines."""
