"""Single-device BLT and the byte-level entropy model: `blt.py` first, then the parts it names."""
