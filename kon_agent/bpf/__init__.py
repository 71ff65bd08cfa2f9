"""The only package that knows BPF: loading and attaching programs, and the layouts of what they count.

Only the supervisor imports these, before and while it has children:

    libbpf      libbpf's C functions, from pylibbpf or the system
    loader      an object file into the kernel
    net         `NetCounters`: the packet counters, and where they are attached
    probe       `Probe`: tracing programs and their rows
    handover    the packet counters on their way from one supervisor to the next

Workers read mappings through these, which need no library and no privilege:

    interfaces  what network devices there are, and which of them the configuration asks for
    layout      the packet counters: sizes, the interface table, reading a slot's counters
    origin      where a plugin's figures come from: BPF, or procfs and why
    rows        what every probe shares with its plugin; `probes` lists them all
"""
