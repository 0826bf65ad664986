"""Adds ``configs/`` to the packages, as ``moka_pl.configs``; all else is in pyproject.toml."""

# There, packages are either all listed or all found, and what is found has the name of its folder.

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["moka_pl*"]), "moka_pl.configs"])
