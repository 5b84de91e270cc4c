"""FLOPs of a step by how much is frozen, counted before training: what makes sweeps of Linear Freezing cost the same."""

import copy
import statistics

from torch.utils.data import DataLoader

from smartfrz.adapters.torch import trace_layers
from smartfrz.adapters.torch.costs import measure_step
from smartfrz.baselines.linear_freezing import moments
from smartfrz.training import arguments

GRID = 200  # moments of a run at which its cost is looked at


def costs_by_frozen(model, loss, layers):
    """FLOPs of a step with the first 0, 1, ... layers frozen; the last one always trains.

    Args:
        model: The model, which is left as it is.
        loss: Computes the loss of one batch, from a model.
        layers: All layers, in execution order.
    """
    twin, costs = copy.deepcopy(model), []
    for layer in [None, *layers[:-1]]:
        for name in layer.parameters if layer is not None else ():
            twin.get_parameter(name).requires_grad_(False)
        work = measure_step(twin, lambda: loss(twin))
        costs.append(work.forward_flops + work.backward_flops)
    return costs


def mean_cost(costs, t_0):
    """FLOPs of the mean step of a run of Linear Freezing."""
    ends = moments(len(costs), t_0)
    frozen = [sum(end <= (k + 0.5) / GRID for end in ends) for k in range(GRID)]
    return statistics.mean(costs[min(number, len(costs) - 1)] for number in frozen)


def equal_cost_shares(task, seed, names):
    """Shares of the steps of full training with which runs of Linear Freezing cost the same.

    An earlier t_0 saves more of a step, and so gets more of them, as in the paper.

    Args:
        task: Task of `smartfrz.comparing.pytorch`.
        seed: Seed of the model.
        names: Names of methods, those of Linear Freezing as `linear:t_0`.
    """
    model = task.model(seed)
    inputs, targets = next(iter(DataLoader(task.train, task.batch_size)))
    args, keywords = arguments(inputs)
    layers = trace_layers(model.eval(), *args, **keywords)
    costs = costs_by_frozen(model.train(), lambda twin: task.loss(twin, inputs, targets), layers)
    starts = {name: float(name.partition(":")[2]) for name in names if name.startswith("linear:")}
    return {name: mean_cost(costs, 0.5) / mean_cost(costs, t_0) for name, t_0 in starts.items()}
