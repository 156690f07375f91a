"""`python -m peftkit`."""

from peftkit.cli import main

if __name__ == "__main__":
    main()
