"""Estimates of what a recipe needs on a cluster: memory, communication, data rate, time."""

from maestro_scale.planning.plan import (
    GPUS,
    Cluster,
    ClusterPlan,
    LayoutEstimate,
    PlanningError,
    plan_cluster,
)

__all__ = ["GPUS", "Cluster", "ClusterPlan", "LayoutEstimate", "PlanningError", "plan_cluster"]
