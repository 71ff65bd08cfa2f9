"""The harness: the real agent and the real receiver as processes, and what every test asks of them.

`program` starts and ends processes, `receiver` and `agent` are the two of them, `waiting` waits, `law` states the
conservation law and exactly-once, `witness` reads rings after their owner's death, `legacy_server` is a server that
knows the original's protocol only.
"""
