"""What will and will not work on this machine with a configuration, before anything is spent.

Each check runs in a process of its own under a time limit, so that a package that breaks, a plugin that ends its
process or a disk that hangs is one line of the report and not its end.
"""
