#!/usr/bin/env python3
"""Draws the gate curves of a run from its TensorBoard events; ``--help`` says how."""

from moka_pl.studies.gates import main

if __name__ == "__main__":
    main()
