"""Plans: a recipe's rules applied to the facts of one model."""

from qdetr_cli.plan.costs import published_share
from qdetr_cli.plan.making import make_plan
from qdetr_cli.plan.modules import ModulePlan, Plan, SlotPlan, ladder_groups

__all__ = ["ModulePlan", "Plan", "SlotPlan", "ladder_groups", "make_plan", "published_share"]
