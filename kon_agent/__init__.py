"""Kon-Agent: watches a Linux host at the edge and delivers what it sees, whatever happens."""

__version__ = "0.1.0"
