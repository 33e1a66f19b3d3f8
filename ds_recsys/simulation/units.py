"""Link rates as people write them: 250mbit, 1.5gbit, or a number of bits per second."""

import re

from ds_recsys.errors import UserError

_UNITS = {"": 1.0, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([kmg]?bit)?", re.IGNORECASE)
SLOWEST, FASTEST = 1e6, 100e9  # bit/s: below, one jumbo frame takes 70 ms; above, the counters of tbf overflow


def parse_rate(value, where: str = "rate") -> float:
    """Bits per second of `value`, a number or a text such as "250mbit".

    Raises:
        UserError: not a rate, or outside 1 Mbit/s to 100 Gbit/s.
    """
    match = _RATE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if match is None:
        raise UserError(f"{where}: {value!r} is no link rate; write 250mbit, 1.5gbit or a number of bit/s")
    rate = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if not SLOWEST <= rate <= FASTEST:
        raise UserError(f"{where}: {value!r} is {rate:g} bit/s; a link has 1 Mbit/s to 100 Gbit/s")
    return rate


def format_rate(rate: float | None) -> str:
    """Bits per second for people: "250 Mbit/s"; None is "unlimited"."""
    if rate is None:
        return "unlimited"
    return f"{rate / 1e9:.4g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:.4g} Mbit/s"
