"""Measures the kernels against what torch ships: `fastgpt bench kernels`, `fastgpt bench table`.

timing.py times and weighs calls, kernels.py has one function an op, measure.py makes rows of figures out of both,
report.py and table.py show them.
"""
