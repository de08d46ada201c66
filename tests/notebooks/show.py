"""Runs a text notebook as a script, and writes its pictures as PNGs beside it: python show.py 00_tour.py"""

import pathlib
import runpy
import sys
import warnings

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")  # what plt.show() says here
path = pathlib.Path(sys.argv[1])
runpy.run_path(str(path), run_name="__main__")
for number in pyplot.get_fignums():
    pyplot.figure(number).savefig(path.with_name(f"{path.stem}_{number}.png"))
