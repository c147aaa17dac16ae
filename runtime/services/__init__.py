"""The five services: each decides purely from the log, and performs its own effects."""
