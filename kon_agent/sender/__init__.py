"""The sender: the one process with the network, from every ring to the server and back to the tail.

`lane` reads a ring and remembers what is in flight, `dialect` speaks to a server of either protocol, `transport` owns
the QUIC connection (the only aioquic here), `channel` carries the supervisor's orders, `main` is the process body.
"""
