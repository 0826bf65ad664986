"""One file type a file: from a path to located records, within bounds of memory."""
