"""`python -m qdetr_cli`, which `accelerate launch -m qdetr_cli` needs."""

from qdetr_cli.cli import main

if __name__ == "__main__":
    main()
