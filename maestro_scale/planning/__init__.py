"""What a recipe needs on a cluster that is not at hand: memory, traffic, data rate, time."""

from maestro_scale.planning.plan import (
    GPUS,
    Cluster,
    ClusterPlan,
    LayoutEstimate,
    PlanningError,
    plan_cluster,
)

__all__ = ["GPUS", "Cluster", "ClusterPlan", "LayoutEstimate", "PlanningError", "plan_cluster"]
