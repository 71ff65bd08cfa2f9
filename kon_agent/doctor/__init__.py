"""The doctor: what of this machine, its kernel, its files and its network stands in the agent's way, and what to do.

    finding    one line of the report: a check, its verdict, what was found, what to do
    patient    what is examined: the configuration, the running agent if there is one, this process's rights
    kernel     what eBPF needs of the kernel
    network    the interfaces the configuration watches
    host       files, users, limits, the clock
    receiver   the servers, and our certificate
    checks     all of them, in order

A check is two functions: `_read_…` or a library call gets facts, a pure `judge_…` makes findings of them. Invariants:
nothing is changed, no program attached, no secret printed; a check that raises costs its own line only. One that hangs
or kills its process does too: `cli.doctor` runs them in a process of their own.
"""
