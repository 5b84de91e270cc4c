"""Weight change with the predictor's own calibration: `python -m benchmarks.calibrated_baseline RUNS`.

The card of a predictor gives the baseline the threshold of the highest accuracy on the training
runs. Here it gets what the predictor gets: the lowest threshold with a precision of 0.9 on the same
validation runs. Held-out architectures and three seeds as in the card.
"""

import sys
import warnings

from smartfrz.dataset_builder.building import labelled_runs, mean_quality
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.storage import read_run, run_files
from smartfrz.predictor.training import TrainingOptions, calibrate, quality, split, weight_change


def main(folder: str) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")  # runs without any positive answer have no precision
    options = TrainingOptions()
    runs = labelled_runs([read_run(path) for path in run_files(folder)], LabelRule(), 30)
    results = []
    for held_out in sorted({run.architecture for run in runs}):
        rest = [run for run in runs if run.architecture != held_out]
        test = [run for run in runs if run.architecture == held_out]
        for seed in range(3):
            _, validation = split(rest, seed)
            threshold = calibrate(weight_change(validation, options), validation, options, options.precision)
            results.append(quality(weight_change(test, options), test, threshold, options))
        print(held_out, mean_quality(results[-3:]).to_dict())
    print("mean", mean_quality(results).to_dict())


if __name__ == "__main__":
    main(sys.argv[1])
