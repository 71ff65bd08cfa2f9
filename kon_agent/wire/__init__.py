"""The wire: frames, and the protobuf messages inside them; docs/protocol.md is the contract."""
