"""Episodes: one harness, one example, one process.

``zygote.py`` is the program that forks the processes, ``child.py`` what runs in each of them; ``host.py`` is one zygote
seen from here, ``pool.py`` decides how many run, ``episode.py`` is the channel to one process and its clock, and
``broker.py`` answers the harness and records the trajectory. Isolation of files, network and identity is applied inside
the forked process, before any code of the harness runs (``confine`` in ``child.py``).
"""
