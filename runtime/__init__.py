"""The runtime: the log, the five services, engines, replay and the command line."""
