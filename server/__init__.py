"""The aggregation server: HTTP for downloads, MQTT for uploads, numpy for the mathematics. No torch here."""
