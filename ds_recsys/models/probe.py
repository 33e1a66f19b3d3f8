"""Can this model be cut into pipeline layers? Checked on the skeleton itself, at batch 2 x length 3, for any model.

A type that nobody tried is accepted or refused on what its forward does: layers called once each and in order, on one
tensor; nothing handed to a layer that depends on hidden states, token ids or parameters of another stage.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_recsys.errors import UserError
from ds_recsys.models.head_form import HeadForm, probe_head
from ds_recsys.models.replay import Call, with_hidden
from ds_recsys.models.unsupported import refuse

if TYPE_CHECKING:
    from ds_recsys.models.skeleton import Skeleton

BATCH, LENGTH = 2, 3
CPU = torch.device("cpu")


def probe(skeleton: "Skeleton") -> None:
    """Fill in what the skeleton must know of its model (`wrap`, `trunk_name`, `canned`, `owner`, `glue`, `head_form`), or raise
    `UserError`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            for check in (_find_return_style, _check_arguments, _assign_parameters, _find_head_form):
                check(skeleton)
        except UserError:
            raise
        except Exception as exc:  # HF's code, run in a way it was not written for: whatever it raises is a reason
            _fail(skeleton, f"{check.__name__.strip('_')} met {type(exc).__name__}: {str(exc).splitlines()[0][:160]}")


def _fail(skeleton: "Skeleton", reason: str) -> None:
    refuse(skeleton.config.model_type, reason)


def _record(skeleton: "Skeleton", training: bool, **kwargs: Any) -> Any:
    with torch.no_grad():
        return skeleton.record(BATCH, LENGTH, torch.float32, CPU, training, **kwargs)


def _random_fill(skeleton: "Skeleton") -> dict[str, Tensor]:
    """Like `Skeleton.fill`, with a random last axis: constants vanish in a norm."""
    return {name: torch.randn(p.shape[-1:]).expand(p.shape) for name, p in skeleton.outer.items()}


def _random_ids(skeleton: "Skeleton") -> Tensor:
    return torch.randint(1, max(skeleton.embedding.weight.shape[0], 2), (BATCH, LENGTH))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _find_return_style(skeleton: "Skeleton") -> None:
    """Do layers return a tensor or a tuple? The caller knows, so try each and see which one HF's forward gets
    through.
    """
    styles = (lambda h: h, lambda h: (h,), lambda h: (h, None), lambda h: (h, None, None))
    error: Exception | None = None
    for style in styles:
        skeleton.wrap = style
        try:
            replay = _record(skeleton, training=False)
        except UserError:
            raise
        except Exception as exc:  # any exception of HF's code on a stub of the wrong style; the last one is reported
            error = exc
            continue
        seen = [x.shape if isinstance(x, Tensor) else None for x in replay.inputs]
        if seen and all(s is not None and len(s) >= 3 and s == seen[0] for s in seen):
            break
        error = error or ValueError(f"layers are given inputs of shapes {seen[:3]}")
    else:
        _fail(
            skeleton, f"its forward does not run over stubs of its layers ({type(error).__name__}: {str(error)[:160]})"
        )
    if tuple(seen[0][:2]) != (BATCH, LENGTH):
        _fail(skeleton, f"hidden states are laid out as {tuple(seen[0])}, not [batch, length, hidden]")
    if replay.order != list(range(len(skeleton.blocks))):
        _fail(
            skeleton,
            f"its {len(skeleton.blocks)} layers are called in the order {replay.order[:8]}, not once each in turn",
        )
    if replay.embeds != 1:
        _fail(skeleton, f"the token embedding is called {replay.embeds} times")
    if skeleton.trunk_name is None or replay.trunk_out is None:
        _fail(skeleton, "the causal LM calls no module that holds its layers")
    skeleton.canned = _without_tensors(replay.trunk_out)


def _without_tensors(out: Any) -> Any:
    return None if isinstance(out, Tensor) else with_hidden(out, None)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{path}.{key}")
    else:
        yield path, value


def _check_arguments(skeleton: "Skeleton") -> None:
    """Record twice with other embeddings, ids and stand-in parameters: whatever differs depends on another stage.

    The second outputs of layers that return tuples differ too: a layer that gets its predecessor's router state is
    caught.
    """
    width = skeleton.embedding.weight.shape[1]
    wrap = skeleton.wrap
    extra = len(wrap(torch.zeros(1))) - 1 if isinstance(wrap(torch.zeros(1)), tuple) else 0
    for training in (False, True):
        first = _record(skeleton, training)
        if extra:
            skeleton.wrap = lambda h: (h, *(torch.randn(BATCH, LENGTH, width) for _ in range(extra)))
        try:
            other = _record(
                skeleton, training, embedded=torch.randn(BATCH, LENGTH, width), ids=_random_ids(skeleton),
                params=_random_fill(skeleton),
            )  # fmt: skip
        finally:
            skeleton.wrap = wrap
        for index, (a, b) in enumerate(zip(first.calls, other.calls, strict=True)):
            _compare(skeleton, index, a, b)


def _compare(skeleton: "Skeleton", index: int, a: Call, b: Call) -> None:
    for name, value in [*enumerate(a.args), *a.kwargs.items()]:
        if name != a.at and isinstance(value, (dict, list, set)) and not value:
            _fail(skeleton, f"layer {index} shares mutable state with other layers through argument {name!r}")
    left, right = dict(_leaves((a.args, a.kwargs), "")), dict(_leaves((b.args, b.kwargs), ""))
    for path in left.keys() | right.keys():
        value, twin = left.get(path), right.get(path)
        if isinstance(value, Tensor) or isinstance(twin, Tensor):
            if not isinstance(value, Tensor) or not isinstance(twin, Tensor) or not _same(value, twin):
                name = path.split(".")[2]
                _fail(
                    skeleton,
                    f"layer {index}'s argument {name!r} depends on token ids, other layers' outputs or "
                    "parameters outside the layers",
                )
        elif "Cache" in type(value).__name__:
            _fail(skeleton, f"layer {index} is given a {type(value).__name__} although use_cache is off")


def _assign_parameters(skeleton: "Skeleton") -> None:
    """Which outer parameters does each boundary, and the head, use? Asked of autograd, not guessed from names."""
    n, width = len(skeleton.blocks), skeleton.embedding.weight.shape[1]
    skeleton.owner = {}
    skeleton.glue = [False] * n + [True]
    for training in (False, True):
        replay = _record(skeleton, training, embedded=torch.randn(BATCH, LENGTH, width), params=_random_fill(skeleton))
        given = [replay.inject["embed"], *replay.outputs[:-1]]
        for i in range(n):
            skeleton.glue[i] = skeleton.glue[i] or not _same(replay.inputs[i], given[i])
    for index in range(n + 1):
        if skeleton.glue[index]:
            hidden = torch.randn(given[0].shape if index == 0 else replay.inputs[0].shape)
            out = _use(skeleton, index, hidden)
    skeleton.glue[n] = n in skeleton.owner.values() or not all(
        _same(skeleton.boundary(n, hidden, {}, training), hidden) for training in (False, True)
    )
    if out.dim() != 3:
        _fail(skeleton, f"last_hidden_state has shape {tuple(out.shape)}")
    skeleton.hidden_width = out.shape[-1]
    _use_head(skeleton, skeleton.hidden_width)
    skeleton.tied = skeleton.owner.get(skeleton.table_name) == "head"
    if skeleton.table_name in skeleton.owner and not skeleton.tied:
        _fail(skeleton, "the token table is read elsewhere than in the embedding and the head")


def _use(skeleton: "Skeleton", index: int, hidden: Tensor) -> Tensor:
    """Record the parameters that boundary `index` uses; fail if it needs anything but `hidden` and those."""
    values = _random_fill(skeleton)
    leaves = {name: v.clone().requires_grad_() for name, v in _last_axes(values).items()}
    out = skeleton.boundary(index, hidden, {n: leaf.expand(values[n].shape) for n, leaf in leaves.items()}, False)
    _own(skeleton, index, leaves, out)
    out = out.detach()
    with torch.no_grad():
        for name in skeleton.outer.keys() - set(
            skeleton.owned(index)
        ):  # read under no_grad: sinusoids kept as parameters
            if not _same(skeleton.boundary(index, hidden, {**values, name: -values[name]}, False), out):
                _take(skeleton, index, name)
        if not _same(skeleton.boundary(index, hidden, values, False, ids=_random_ids(skeleton)), out):
            _fail(skeleton, f"what it computes before layer {index} depends on token ids besides the embedding")
    return out


def _use_head(skeleton: "Skeleton", width: int) -> None:
    """On meta: a stand-in for a table of millions of items would be made whole by the matrix product."""
    device = torch.device("meta")
    leaves = {name: torch.empty(p.shape, device=device, requires_grad=True) for name, p in skeleton.outer.items()}
    hidden = torch.empty(BATCH, LENGTH, width, device=device)
    buffers = [(m._buffers, k, b) for m in skeleton.model.modules() for k, b in m._buffers.items() if b is not None]
    try:
        out = skeleton.logits(hidden, leaves, False)
    finally:
        for holder, key, buffer in buffers:  # following the replay's device loses their values
            holder[key] = buffer
        skeleton.buffer_device = CPU
    _own(skeleton, "head", leaves, out)


def _find_head_form(skeleton: "Skeleton") -> None:
    form = probe_head(skeleton)
    if not isinstance(form, HeadForm):
        _fail(skeleton, form)
    skeleton.head_form = form


def _own(skeleton: "Skeleton", where: int | str, leaves: dict[str, Tensor], out: Tensor) -> None:
    if not out.requires_grad:
        return
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            _take(skeleton, where, name)


def _take(skeleton: "Skeleton", where: int | str, name: str) -> None:
    if skeleton.owner.setdefault(name, where) != where:
        _fail(skeleton, f"parameter {name!r} is used in two places ({skeleton.owner[name]} and {where})")


def _last_axes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row of each stand-in: [n] of a [.., n] tensor whose rows are all the same."""
    return {name: v[(0,) * (v.dim() - 1)] if v.dim() else v for name, v in values.items()}
