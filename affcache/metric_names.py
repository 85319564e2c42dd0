"""What metrics are called for people."""


def metric_name(metric: str) -> str:
    """Return the name of a metric as papers write it: macro F1 for macro_f1."""
    return metric.replace("_", " ").replace("f1", "F1").replace("ccc", "CCC")
