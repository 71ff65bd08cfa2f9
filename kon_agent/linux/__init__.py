"""The Linux kernel as this project needs it: the only place where libc is called through ctypes.

One noun per module; each is a leaf that knows nothing of agents, rings or plugins.
"""
