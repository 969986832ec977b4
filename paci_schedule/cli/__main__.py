"""`python -m paci_schedule.cli` is the `paci` command."""

from paci_schedule.cli import main

if __name__ == "__main__":
    main()
