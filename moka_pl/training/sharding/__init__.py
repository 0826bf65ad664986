"""Frozen bases whose blocks are spread over ranks, or kept in the CPU's memory."""
