"""The commands, one file each, with their result types. Nothing here prints."""

from gdetkd_cli.commands.advise import run_advise
from gdetkd_cli.commands.bench import profile_distill
from gdetkd_cli.commands.compare import run_compare
from gdetkd_cli.commands.data import run_data
from gdetkd_cli.commands.demo import run_demo
from gdetkd_cli.commands.evaluate import run_eval
from gdetkd_cli.commands.export import run_export
from gdetkd_cli.commands.init import run_init, run_probe_to_recipe
from gdetkd_cli.commands.plan import plan_distill
from gdetkd_cli.commands.predict import run_predict
from gdetkd_cli.commands.probe import run_probe
from gdetkd_cli.commands.report import run_report
from gdetkd_cli.commands.teach import run_teach
from gdetkd_cli.commands.train import resume_run, run_distill, run_train
from gdetkd_cli.commands.validate import check_recipe

__all__ = [
    "check_recipe",
    "plan_distill",
    "profile_distill",
    "resume_run",
    "run_advise",
    "run_compare",
    "run_data",
    "run_demo",
    "run_distill",
    "run_eval",
    "run_export",
    "run_init",
    "run_predict",
    "run_probe",
    "run_probe_to_recipe",
    "run_report",
    "run_teach",
    "run_train",
]
