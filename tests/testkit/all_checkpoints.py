"""The command line of evaluations, where a finetuning keeps all of its checkpoints instead of the newest."""

import sys

if __name__ == "__main__":
    from maestro_scale.evaluation.finetune import setup
    from maestro_scale.training.checkpoint.retention import Retention

    setup.Retention = lambda keep: Retention(99)
    from maestro_scale.evaluate import main
    from maestro_scale.training.distributed import hard_exit

    sys.argv[0] = "evaluate.py"
    hard_exit(main())
