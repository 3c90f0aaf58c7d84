"""`python -m tritorch` is the command `tritorch`."""

from tritorch.cli import main

if __name__ == "__main__":
    main(prog_name="tritorch")
