"""What export, edge and server must agree on: names, packed layout, adapter arithmetic, messages. No torch here."""

PROTOCOL_VERSION = 3
