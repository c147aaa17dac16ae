"""What a process does to confine itself. The standard library only: it runs where nothing else may."""
