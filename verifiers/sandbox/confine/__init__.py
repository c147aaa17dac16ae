"""What a process does to confine itself. The standard library only: it runs where nothing else may.

What is imported here is loaded anew for every program that is started, so it is little: the interpreter's own C modules
and ctypes. Types are imported for the type checker alone.
"""
