"""Writes a trained adapter in the formats of others, each read back by its reader and compared."""
