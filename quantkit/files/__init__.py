"""Files on disk: read lazily, written to known offsets, and given their names only when whole."""
