"""What benchmarks ask of a library, in processes of its own.

`eval.kernels`: definition, evaluate, sample, facts. `eval.training`: architecture, sample. Both: compile_share.
"""
