"""What each command does: returns plain data, never prints."""

from gdetkd_cli.runs.compare import run_compare
from gdetkd_cli.runs.demo import run_demo
from gdetkd_cli.runs.evaluate import run_eval
from gdetkd_cli.runs.export import run_export
from gdetkd_cli.runs.init import check_recipe, run_init, run_probe_to_recipe
from gdetkd_cli.runs.plan import plan_distill, profile_distill
from gdetkd_cli.runs.probe import run_probe
from gdetkd_cli.runs.train import resume_run, run_distill, run_train

__all__ = [
    "check_recipe",
    "plan_distill",
    "profile_distill",
    "resume_run",
    "run_compare",
    "run_demo",
    "run_distill",
    "run_eval",
    "run_export",
    "run_init",
    "run_probe",
    "run_probe_to_recipe",
    "run_train",
]
