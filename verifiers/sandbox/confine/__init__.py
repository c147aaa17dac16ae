"""What a process does to confine itself. The standard library only: it runs where nothing else may.

What is imported here is in every process that confines itself, so it is little: the interpreter's own C modules, ctypes
and, in the zygote, signal. Types are imported for the type checker alone.
"""
