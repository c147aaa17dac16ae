"""Runs as files: ``bascule-export/1``, written, read, checked and imported."""
