"""What a causal LM's head does besides the product with the item table, found out by asking HF's code.

    scores = softcap(scale * (transform(last_hidden_state) . item + bias))

The loss never holds scores of all items, so it has to know this form: Cohere and Granite scale, Gemma 2 caps, BERT
transforms, GPT-J has a bias. `probe_head` reads the numbers off HF's own forward and checks them on other values.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ds_recsys.models.skeleton import Skeleton


@dataclass(frozen=True)
class HeadForm:
    """`weight` and `bias`: HF names; `transform`: something is computed before the product; the rest as `HeadShard`."""

    weight: str = ""
    bias: str | None = None
    transform: bool = False
    scale: float = 1.0
    softcap: float | None = None


def probe_head(skeleton: "Skeleton") -> HeadForm | str:
    """The form of the head, or why it has no such form."""
    held = [attr for attr, parameter in skeleton.head._parameters.items() if parameter is not None]
    names = {attr: skeleton.aliases[f"{skeleton.head_name}.{attr}"] for attr in held}
    outer = {skeleton.table_name, *skeleton.owned("head")}
    if not outer >= set(names.values()):
        return f"its head reads {sorted(set(names.values()) - outer)}, which layers read too"
    hidden = torch.randn(2, 3, skeleton.hidden_width)
    transform = not torch.equal(skeleton.head_input(hidden, {}, True), hidden)
    transform = transform or not torch.equal(skeleton.head_input(hidden, {}, False), hidden)
    products = torch.tensor([2.0**-20, -2.0, 0.5, 40.0, 1e30], dtype=torch.float64)
    given = skeleton.head_output(products).double()  # a few types cast to fp32
    if not torch.equal(given[:2], skeleton.head_output(products[:2]).double()):
        return "its head mixes the scores of different items"
    scale = round((given[0] / products[0]).item(), 12)
    if torch.allclose(given, products * scale, rtol=1e-6):
        softcap = None
    else:
        softcap = given[4].item()
        want = softcap * torch.tanh(products * scale / softcap)
        if not torch.isfinite(want).all() or not torch.allclose(given, want, rtol=1e-6):
            return "its head does more to the scores than scale them and cap them with tanh"
    return HeadForm(names["weight"], names.get("bias"), transform, scale, softcap)
