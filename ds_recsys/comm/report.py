"""What compression saved, in words."""


def summary(compression) -> str:
    """A few lines on a `GradientCompression`, of this rank."""
    reducer = compression.reducer
    if reducer is None:
        why = f"; {compression.choice}" if compression.choice else ""
        return f"gradient compression: off{why}"
    totals = reducer.totals
    ratio = totals.dense_bytes / totals.sent_bytes if totals.sent_bytes else 1.0
    lines = [
        f"gradient compression: {reducer.options.method}{', hierarchical' if reducer.hierarchical else ''}; "
        f"{totals.steps} steps, {totals.skipped} skipped",
        f"sent {totals.sent_bytes / 1e6:,.1f} MB in place of {totals.dense_bytes / 1e6:,.1f} MB dense ({ratio:.1f} times "
        f"less); {totals.seconds:.1f} s in reductions, of which the training waited {compression.seconds_waited:.1f} s",
    ]
    if totals.errors:
        lines.append(f"not sent at once: {totals.errors[-1]:.1%} of the gradients' norm, kept by error feedback")
    if compression.choice:
        lines.append(f"auto: {compression.choice}")
    return "\n".join(lines)
