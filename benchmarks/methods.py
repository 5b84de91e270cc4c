"""The methods that `benchmarks.compare` knows: another one is another entry of `methods_of`."""

import functools

import torch
from safetensors.torch import load_model

from smartfrz.adapters.torch import PrefixCache
from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing, WeightChange
from smartfrz.baselines.similarity_guided import SimilarityGuided
from smartfrz.comparing.engine import Method
from smartfrz.dataset_builder.labels import LabelRule

EARLY = {
    f"early-stop-{percent}": percent / 100 for percent in (30, 50, 70, 85)
}  # full training in a share of the steps
METHODS = (
    "full",
    "smartfrz",
    "smartfrz-prefix",
    "smartfrz-cost_aware",
    "smartfrz+cache",
    "linear",
    "autofreeze",
    "grades",
    "weight-change",
    "similarity-guided",
    "early-stop",
    *EARLY,
)
# SmartFRZ as it comes, but for the threshold and the share of the steps; chosen before any was measured.
TRADEOFF = {
    "threshold-0.5": {"threshold": 0.5},
    "threshold-0.85": {"threshold": 0.85},
    "threshold-0.95": {"threshold": 0.95},
    "steps-85": {"share": 0.85},
    "threshold-0.85-steps-85": {"threshold": 0.85, "share": 0.85},
}
SWEEPS = {"linear": (0.3, 0.4, 0.5, 0.6), "autofreeze": (2, 3, 4, 5)}  # t_0; evaluations an epoch (M)
SWEPT = tuple(f"{method}:{value}" for method, values in SWEEPS.items() for value in values)
# Similarity has to have settled for a third of the run: with a tenth of it, the default, the oracle froze a VGG after 48
# of 472 steps, before it had learned anything, and lost ten points.
SETTLED = LabelRule("backward", tolerance=0.02, records=10)


def methods_of(job):
    """Name to `Method`, for a job of `benchmarks.compare`."""
    device = {"device": "cuda" if job.device == "cuda" and _onnxruntime_has_cuda() else "cpu"}

    def smartfrz(name, share=1.0, cache=None, **options):
        return Method(name, lambda run: job.predictor, device | options, cache, share)

    def baseline(name, policy, **options):
        return Method(name, policy, device, **options)

    def linear(name, t_0):
        return baseline(name, lambda run: LinearFreezing(t_0), own_schedule=True)

    def autofreeze(name, intervals):
        return baseline(
            name, lambda run: AutoFreeze(steps_per_epoch=run.steps_per_epoch, intervals_per_epoch=intervals)
        )

    made = [
        Method("full"),
        smartfrz("smartfrz"),
        smartfrz("smartfrz-prefix", freeze_order="prefix"),
        smartfrz("smartfrz-cost_aware", freeze_order="cost_aware"),
        smartfrz("smartfrz+cache", cache=lambda: PrefixCache(memory="4GB")),
        linear("linear", 0.5),
        autofreeze("autofreeze", 4),
        baseline("grades", lambda run: GradES(0.5, relative=True)),  # a tau of its own for each task would be tuned
        baseline("weight-change", lambda run: calibrated_weight_change(job.predictor)),
        baseline("similarity-guided", lambda run: oracle(job, run)),
        Method("early-stop"),  # its share is known once SmartFRZ has run
        *(Method(name, share=share) for name, share in EARLY.items()),
        *(smartfrz(name, **options) for name, options in TRADEOFF.items()),
        *(linear(f"linear:{t_0}", t_0) for t_0 in SWEEPS["linear"]),
        *(autofreeze(f"autofreeze:{intervals}", intervals) for intervals in SWEEPS["autofreeze"]),
    ]
    return {method.name: method for method in made}


def stops_early(name):
    """Whether a method is full training in fewer steps."""
    return name.startswith("early-stop")


def calibrated_weight_change(predictor):
    """The weight change with the limit that was calibrated on the predictor's own recordings."""
    threshold = predictor.info.metrics.get("weight_change_calibrated_threshold")
    return WeightChange() if threshold is None else WeightChange(limit=10.0**-threshold)


def oracle(job, run):
    """Similarity-guided freezing, whose reference is the finished full run."""
    reference = job.model(job.seed)
    load_model(reference, str(job.reference), device=job.device)
    return SimilarityGuided(run.model, reference, job.probe(run.task.validation), rule=SETTLED)


@functools.cache
def _onnxruntime_has_cuda():
    from smartfrz.predictor.runtime import import_onnxruntime

    return torch.cuda.is_available() and "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
