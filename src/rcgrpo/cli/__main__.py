"""`python -m rcgrpo.cli`, the same as `rcgrpo`."""

from . import main

main()
