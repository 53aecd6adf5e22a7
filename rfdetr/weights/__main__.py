"""python -m rfdetr.weights list|get SIZE"""

from rfdetr.packages import check_packages

check_packages(__name__)

from rfdetr.console import run_script
from rfdetr.weights.download import main

run_script(main)
