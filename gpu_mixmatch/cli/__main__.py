"""The command line as a module: ``python -m gpu_mixmatch.cli``."""

from gpu_mixmatch.cli.app import main

main()
