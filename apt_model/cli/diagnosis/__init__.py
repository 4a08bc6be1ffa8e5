"""What `apt-model doctor` looks at: checks over a described machine, and probes in processes of their own.

    system.py    the machine, as one object that tests can make up
    packages.py  what is installed, from its metadata; versions and requirements
    installed.py, gpu.py, memory.py, disk.py, settings.py    a check a function: System -> findings
    probe.py     what a child process tries; started by children.py, with a limit of time
    verdicts.py  what children told, as findings
    diagnose.py  all of it, in the order that takes the least time

Nothing here loads torch in the process of the command: it may be what is broken.
"""
