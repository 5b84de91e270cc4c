"""One engine that compares ways to train the same task: fully, with SmartFRZ, with a baseline, in fewer steps.

`engine` says what a method, a run and a result are, and trains runs in turns; `lines` keeps results in a file; `pytorch`
and `keras` train tasks of these frameworks, which implement `tasks.AnyTask` and `engine.Run`.
"""
