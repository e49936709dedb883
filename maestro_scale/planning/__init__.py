"""What a recipe needs on a cluster that is not at hand: memory, traffic, data rate, time."""

from maestro_scale.planning.plan import GPUS, Cluster, Layout, Plan, PlanningError, make_plan

__all__ = ["GPUS", "Cluster", "Layout", "Plan", "PlanningError", "make_plan"]
