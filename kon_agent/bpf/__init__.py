"""The only package that knows BPF: the loader, the counters' shared layout, and which interfaces to watch.

    interfaces  what network devices there are, and which of them the configuration asks for
    layout      what kernel and user space share: sizes, the interface table, reading a slot's counters
    libbpf      libbpf's C functions, from the library pylibbpf brings along
    net         `NetCounters`: load, freeze, attach, detach

Only the supervisor imports `libbpf` and `net`; workers read a mapping through `layout`, which needs neither.
"""
