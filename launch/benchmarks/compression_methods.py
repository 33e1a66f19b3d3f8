"""What bench.py compression compares: names, and the options that ds_recsys takes for each."""

DENSE, AUTO = "dense", "auto"
POWERSGD_RANK = 4
_RATIO = 0.01

OURS = {  # name: method and options, both of `Reducer` and of "recsys.compression"
    "bf16": {"method": "bf16"},
    "powersgd": {"method": "powersgd", "rank": POWERSGD_RANK},
    "int8": {"method": "int8"},
    "int4": {"method": "int4"},
    "int4_rotated": {"method": "int4", "rotate": True},
    "sign": {"method": "sign"},
    "topk": {"method": "topk", "ratio": _RATIO},
    "topk_int8": {"method": "topk", "ratio": _RATIO, "values": "int8"},
    "randomk": {"method": "randomk", "ratio": _RATIO},
    "auto": {"method": AUTO},
}
PEERS = ("ddp_bf16", "ddp_powersgd")  # torch's communication hooks
METHODS = (*PEERS, *OURS)  # beside the dense one
HIERARCHY = {  # between two hosts of two ranks
    f"{name}_{form}": {"method": name, "hierarchical": form == "hierarchical"}
    for name in ("int8", "int4")
    for form in ("flat", "hierarchical")
}
TITLES = {
    "dense": "dense fp32",
    "ddp_bf16": "torch's bf16 hook",
    "ddp_powersgd": f"torch's PowerSGD hook, rank {POWERSGD_RANK}",
    "powersgd": f"PowerSGD, rank {POWERSGD_RANK}",
    "int4_rotated": "int4, rotated",
    "topk": f"top-k {_RATIO:.0%}",
    "topk_int8": f"top-k {_RATIO:.0%}, int8 values",
    "randomk": f"random-k {_RATIO:.0%}",
}


def title(name: str) -> str:
    """For people."""
    return TITLES.get(name, name.replace("_", ", "))


def rounds(methods: list[str], size: int = 4) -> list[list[str]]:
    """The methods, a few at a time and each time beside the dense one: the residuals of all would not fit in memory."""
    methods = [method for method in methods if method != DENSE]
    return [[DENSE, *methods[i : i + size]] for i in range(0, len(methods), size)]
