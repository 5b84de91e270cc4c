"""Sends the picture of a run to what keeps it: TensorBoard, W&B or MLflow."""

from typing import Any

from smartfrz.control.report import Report

_NAME = "smartfrz/layers"


def send_picture(report: Report, writer: Any) -> None:
    """Send the picture of the layers over steps; nothing if there is none, or matplotlib is missing.

    Args:
        report: The report of the run.
        writer: A `SummaryWriter`, the module `wandb` or one of its runs, the module `mlflow`, or Lightning's logger for
            one of these. Anything else is left alone.
    """
    if not report.num_steps:
        return
    send = _way_to(writer)
    if send is None:
        return
    try:
        from smartfrz.plots import plot_report
    except ImportError:
        return  # numbers need no matplotlib
    send(plot_report(report), report.num_steps)


def _way_to(writer: Any) -> Any:
    """Return a function of a figure and the step, or None."""
    kind = type(writer).__name__
    if kind in ("TensorBoardLogger", "SummaryWriter"):
        board = writer.experiment if kind == "TensorBoardLogger" else writer
        return lambda figure, step: board.add_figure(_NAME, figure, step)
    if kind == "WandbLogger":
        return lambda figure, step: writer.log_image(_NAME, [figure])
    if kind == "MLFlowLogger":
        return lambda figure, step: writer.experiment.log_figure(writer.run_id, figure, f"{_NAME}.png")
    if getattr(writer, "__name__", "") == "wandb":
        return lambda figure, step: writer.log({_NAME: writer.Image(figure)})
    if getattr(writer, "__name__", "") == "mlflow":
        return lambda figure, step: writer.log_figure(figure, f"{_NAME}.png")
    return None
