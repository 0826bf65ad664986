"""The command line: Lightning's commands and one file for each command beside them."""
