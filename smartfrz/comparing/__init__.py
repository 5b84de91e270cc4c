"""One engine that compares ways to train the same task: fully, with SmartFRZ, with a baseline, in fewer steps.

`engine` says what a method, a run and a result are, and trains runs in turns; `lines` keeps results in a file; `pytorch`
trains a PyTorch task. Other frameworks implement `engine.Run`.
"""
