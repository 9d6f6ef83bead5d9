"""``python -m ntk_lightning``."""

from ntk_lightning.cli import main

if __name__ == "__main__":
    main()
