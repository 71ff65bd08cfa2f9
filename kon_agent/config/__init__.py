"""The configuration: shape (`schema`, `receiver`), files (`load`), quantities (`units`, `server`).

Importing this package stays cheap: ruamel.yaml is imported when a file is loaded, not before.
"""

from kon_agent.config.load import MAX_CONFIG_BYTES, check, check_receiver, load, load_receiver
from kon_agent.config.mistake import Mistake
from kon_agent.config.receiver import ReceiverConfig
from kon_agent.config.schema import Config
from kon_agent.config.server import ServerAddress, parse_listen, parse_server

__all__ = [
    "MAX_CONFIG_BYTES",
    "Config",
    "Mistake",
    "ReceiverConfig",
    "ServerAddress",
    "check",
    "check_receiver",
    "load",
    "load_receiver",
    "parse_listen",
    "parse_server",
]
