"""`python -m fastgpt` is the `fastgpt` command (torchrun starts it this way)."""

from fastgpt.cli import main

if __name__ == "__main__":
    main()
