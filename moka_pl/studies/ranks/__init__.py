"""What training on several GPUs costs and gains, measured by runs of the command line."""
