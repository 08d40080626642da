"""One file per phenomenon; every file here is found by itself."""
