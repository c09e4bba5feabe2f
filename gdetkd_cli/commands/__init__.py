"""The commands, one file each, with their result types. Nothing here prints."""

from gdetkd_cli.commands.advise import run_advise as run_advise
from gdetkd_cli.commands.bench import profile_distill as profile_distill
from gdetkd_cli.commands.compare import run_compare as run_compare
from gdetkd_cli.commands.data import run_data as run_data
from gdetkd_cli.commands.demo import run_demo as run_demo
from gdetkd_cli.commands.evaluate import run_eval as run_eval
from gdetkd_cli.commands.export import run_export as run_export
from gdetkd_cli.commands.init import run_init as run_init
from gdetkd_cli.commands.init import run_probe_to_recipe as run_probe_to_recipe
from gdetkd_cli.commands.plan import plan_distill as plan_distill
from gdetkd_cli.commands.predict import run_predict as run_predict
from gdetkd_cli.commands.probe import run_probe as run_probe
from gdetkd_cli.commands.report import run_report as run_report
from gdetkd_cli.commands.teach import run_teach as run_teach
from gdetkd_cli.commands.train import resume_run as resume_run
from gdetkd_cli.commands.train import run_distill as run_distill
from gdetkd_cli.commands.train import run_train as run_train
from gdetkd_cli.commands.validate import check_recipe as check_recipe
