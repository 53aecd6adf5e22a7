"""python -m rfdetr.weights list|get SIZE"""

from rfdetr.console import run_script
from rfdetr.weights.download import main

run_script(main)
