"""PowerSGD: the sum over ranks of matrices, projected to a few of its directions (https://arxiv.org/abs/1905.13727)."""

import hashlib
import math

import torch
from torch import Tensor

from ds_recsys.comm.aggregation import Aggregator
from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.layout import Part, Segment


class LowRank:
    """The sum of matrices M_i over ranks i as P Q^T, P an orthonormal basis of the sums of M_i Q0, Q the sum of M_i^T P.

    Q is the next step's Q0, so that the basis follows the sum's largest directions from step to step. All matrices of a
    call share two all-reduces of fp32 values, of P and of Q. What a rank keeps is M_i - P M_i^T P, so what all kept is what
    the result lacks.

    The results are the same bit for bit on all ranks where the same matrix products give the same bits: ranks of one kind
    of processor, and of one number of threads.

    Args:
        rank: r; of an [m, n] matrix min(r, m, n) directions are kept.
        feedback: an `ErrorFeedback`; its worker side holds the residuals.
    """

    def __init__(self, rank: int, feedback):
        if rank < 1:
            raise ValueError(f"rank {rank}: at least 1")
        self.rank, self.feedback = rank, feedback
        self._queries: dict[str, Tensor] = {}
        self._staged: dict[str, Tensor] = {}

    @torch.no_grad()
    def all_reduce(
        self, flat: Tensor, matrices: list[tuple[Segment, tuple]], aggregator: Aggregator, step: int
    ) -> bool:
        """The segments of `flat` <- the sum over ranks, projected; NaN, on all ranks, where a rank's is not finite.

        Args:
            flat: fp32 [n], contiguous.
            matrices: (segment, shape) of whole tensors of two or more dims, disjoint, the same on all ranks. Of more dims
                [d0, ...] are taken as [d0, product of the rest]. The segments' compressors are not used.
            step: the same on all ranks.

        Returns:
            Whether all values that this rank sent were finite.
        """
        work = [_Matrix(flat, *matrix, self.rank) for matrix in matrices if matrix[0].numel]
        for one in work:
            one.add(*self.feedback.worker(one.part), self.feedback.multiplier)
        bases = flat.new_empty(sum(one.rows * one.rank for one in work))
        for one, basis in zip(work, _views(bases, [(one.rows, one.rank) for one in work]), strict=True):
            one.basis = torch.mm(one.values, self._query(one), out=basis)
        finite = _sum(aggregator, bases, step)
        queries = flat.new_empty(sum(one.columns * one.rank for one in work))
        for one, query in zip(work, _views(queries, [(one.columns, one.rank) for one in work]), strict=True):
            one.query = query
            one.finite = bool(torch.isfinite(one.basis).all())  # a sum: of one mind on all ranks
            if one.finite:
                one.basis = _orthonormal(one.basis)
                torch.mm(one.values.T, one.basis, out=query)
                if one.error is not None:
                    torch.addmm(one.values, one.basis, query.T, alpha=-1, out=one.error)
            else:
                query.zero_()
        finite = _sum(aggregator, queries, step) and finite
        for one in work:
            if one.finite and torch.isfinite(one.query).all():
                torch.mm(one.basis, one.query.T, out=one.values)
                self._staged[one.part.name] = self._alive(one)
            else:
                one.values.fill_(math.nan)
        return finite

    def commit(self) -> None:
        """The step took place: its Qs are where the next one starts."""
        self._queries.update(self._staged)
        self._staged = {}

    def discard(self) -> None:
        """The step was skipped: the Qs stay what they were."""
        self._staged = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter's name -> Q, fp32 [n, min(r, m, n)]; the same on all ranks."""
        return {name: query.clone() for name, query in self._queries.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace all Qs. Those of another rank r are left out: their matrices start anew."""
        self._staged, self._queries = {}, {name: query.clone() for name, query in state.items()}

    def _query(self, one: "_Matrix") -> Tensor:
        query = self._queries.get(one.part.name)
        if query is None or query.shape != (one.columns, one.rank):
            return _first_query(one)
        return query.to(one.values.device)

    def _alive(self, one: "_Matrix") -> Tensor:
        """Q, its zero columns drawn anew: from a Q0 of zeros it would never leave zero."""
        query, dead = one.query.clone(), ~one.query.any(dim=0)
        if dead.any():
            query[:, dead] = _first_query(one)[:, dead]
        return query


class _Matrix:
    def __init__(self, flat: Tensor, segment: Segment, shape, rank: int):
        self.rows, self.columns = as_matrix(shape)
        self.rank = min(rank, self.rows, self.columns)
        start, stop = segment.start, segment.start + segment.numel
        self.part = Part(segment.name, start, stop, segment.offset, segment.compressor)
        self.values = flat[segment.offset : segment.offset + segment.numel].view(self.rows, self.columns)

    def add(self, residual: Tensor | None, error: Tensor | None, multiplier: float) -> None:
        if residual is not None:
            self.values.add_(residual.view_as(self.values), alpha=multiplier)
        self.error = None if error is None else error.view_as(self.values)


def factor_bytes(rank: int, shape) -> int:
    """Of one rank's P and Q of a matrix: 4 min(r, m, n) (m + n)."""
    rows, columns = as_matrix(shape)
    return 4 * min(rank, rows, columns) * (rows + columns)


def as_matrix(shape) -> tuple[int, int]:
    """(d0, product of the other dims)."""
    return shape[0], math.prod(shape[1:])


def _sum(aggregator: Aggregator, values: Tensor, step: int) -> bool:
    return aggregator.all_reduce(values, [Segment("low-rank factors", 0, values.numel(), Float32())], step)


def _views(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    sizes = [rows * columns for rows, columns in shapes]
    return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)] if sizes else []


def _first_query(one: _Matrix) -> Tensor:
    """fp32 [n, r], Gaussian, from the parameter's name alone: drawn on the CPU, so that devices agree."""
    digest = hashlib.blake2b(one.part.name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(one.columns, one.rank, generator=generator).to(one.values.device)


def _orthonormal(basis: Tensor) -> Tensor:
    """Householder's QR: orthonormal columns from any finite matrix, of lower rank or zero too.

    Scaled to a largest value of 1 first, so that squares neither overflow nor vanish.
    """
    largest = basis.abs().max()
    return torch.linalg.qr(torch.where(largest > 0, basis / largest, basis)).Q.contiguous()
