"""Episodes: one harness, one example, one process.

``zygote.py`` is the program that forks the processes, ``child.py`` what runs in each of them, ``confinement.py`` what
each is left with before any code of the harness runs; these three import nothing of bascule. ``host.py`` is one zygote
seen from here, ``prepared.py`` one that has become a batch's, ``pool.py`` decides how many run, ``watch.py`` knows how
much memory they have, ``episode.py`` is the channel to one process and its clock, and ``broker.py`` answers the
harness and records the trajectory. ``allowed.py`` and ``batch.py`` are pure: what a harness may ask for, and what
its ``prepare`` gets.
"""
