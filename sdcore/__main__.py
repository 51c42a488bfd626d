"""`python -m sdcore` is the command line."""

from sdcore.cli import main

raise SystemExit(main())
