"""``python -m maestro_scale.cli``: the command line under launchers (torchrun, srun) that take a module name."""

from maestro_scale.cli import main

if __name__ == "__main__":
    main()
