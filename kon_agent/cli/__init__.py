"""The command lines: `kon-agent` and `kon-receiver`. Nothing else in the package imports from here."""
