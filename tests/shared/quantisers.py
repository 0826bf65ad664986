"""Kinds of quantised weights that are made here, layer by layer."""

#: Packages that are no part of the default installation.
PACKAGES = {"int4": "torchao", "float8": "torchao", "hqq": "hqq"}
KINDS = ["int8", *PACKAGES]
