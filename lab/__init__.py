"""The device lab: an emulated fleet that starts the real programs as processes, and reports what they did."""
