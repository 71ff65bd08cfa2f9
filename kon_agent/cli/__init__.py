"""The command lines: `kon-agent` and `kon-receiver`. Nothing else in the package imports from here."""

DEFAULT_CONFIG = "/etc/kon-agent/agent.yaml"
