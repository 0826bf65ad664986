"""The Kronecker products of given shapes that are nearest to a matrix.

Notation:
    M       matrix, shape (m, n)
    D       M as blocks D[a, b, p, q] of sizes (m_a, m_b, n_a, n_b), cut or zero-filled to that size
    R(M)    the rearrangement: R[(a, p), (b, q)] = D[a, b, p, q], shape (m_a·n_a, m_b·n_b)

A Kronecker product becomes an outer product, ``R(A ⊗ B) = vec(A) vec(B)ᵀ`` with row-major vec, and R keeps
the Frobenius norm. The nearest A ⊗ B is therefore the leading singular pair of R(M), and the nearest sum of c
products of one shape is its c leading ones (Eckart and Young).

Where a product is smaller than the layer, M's entries outside it are out of its reach, and the solution stays
exact. Where it is larger, what stands out is cut, so that those entries could take any value; the solution
here makes them near zero, and its energy is a lower bound of the best one (exact with a left identity).

Source: C. F. Van Loan and N. Pitsianis, "Approximation with Kronecker products", in Linear Algebra for Large
Scale and Real-Time Applications (1993).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import Pairs, Shape

#: Beyond this many entries on the shorter side of R(M), leading singular pairs are found by iteration.
_EXACT = 256
#: Further directions and rounds of the iteration.
_EXTRA, _ROUNDS = 6, 3
#: Size of the Krylov space that a single leading pair is looked for in.
_KRYLOV = 10


def rearrange(matrix: Tensor, shape: Shape) -> Tensor:
    """Returns R(M), (m_a·n_a, m_b·n_b), of M, (m, n): a Kronecker product of ``shape`` has rank one in it."""
    blocks = _blocks(matrix, shape)  # (m_a, m_b, n_a, n_b)
    return blocks.transpose(1, 2).reshape(shape.m_a * shape.n_a, shape.m_b * shape.n_b)


def nearest_products(matrix: Tensor, shape: Shape, count: int = 1) -> tuple[Pairs, Tensor]:
    """Finds the sum of ``count`` Kronecker products of one shape that is nearest to M.

    Minimises ``‖M − Σ_c A_c ⊗ B_c‖_F``. A_c has unit norm and B_c carries the size; different products are
    orthogonal to each other. With an identity on the left all products of a shape share their blocks, so that
    there is one at most.

    Args:
        matrix: M, shape (m, n), floating point.
        shape: Sizes of the products.
        count: How many; fewer come back where R(M) has no more.

    Returns:
        Pairs (A_c or None for an identity, B_c), the largest first, and the energies σ_c² that they capture:
        ``‖M − Σ_c A_c ⊗ B_c‖² ≤ ‖M‖² − Σ_c σ_c²``, an equality where nothing is cut.
    """
    if shape.identity:
        right, energy = _nearest_blocks(matrix, shape)
        return [(None, right)], energy[None]
    u, sizes, v = _leading(rearrange(matrix, shape), count)
    pairs: Pairs = [
        (u[:, c].reshape(shape.m_a, shape.n_a), (sizes[c] * v[:, c]).reshape(shape.m_b, shape.n_b))
        for c in range(len(sizes))
    ]
    return pairs, sizes.square()


def captured_share(matrix: Tensor, shape: Shape, count: int = 1) -> float:
    """Computes the share of M's energy ``‖M‖_F²`` that the nearest sum of products of one shape captures.

    It is 1 for M = 0, of which nothing is missed.

    Args:
        matrix: M, shape (m, n).
        shape: Sizes of the products.
        count: How many.
    """
    whole = matrix.square().sum()
    if not whole > 0:
        return 1.0
    return float((nearest_products(matrix, shape, count)[1].sum() / whole).clamp(max=1))


def _blocks(matrix: Tensor, shape: Shape) -> Tensor:
    m, n = matrix.shape
    full = F.pad(matrix, (0, shape.cols - n, 0, shape.rows - m))  # negative pads cut
    return full.reshape(shape.m_a, shape.m_b, shape.n_a, shape.n_b)


def _nearest_blocks(matrix: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Returns B of the nearest ``I ⊗ B``: the mean of the diagonal blocks, over the layer's entries."""
    blocks = _blocks(matrix, shape).diagonal(dim1=0, dim2=2)  # (m_b, n_b, k)
    inside = _blocks(torch.ones_like(matrix), shape).diagonal(dim1=0, dim2=2).sum(-1)  # (m_b, n_b)
    total = blocks.sum(-1)  # (m_b, n_b)
    right = total / inside.clamp(min=1)
    return right, (right * total).sum()


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the ``count`` leading singular triplets (U, σ, V), exact for float64."""
    short = min(matrix.shape)
    count = min(count, short)
    if matrix.dtype == torch.float64:
        u, sizes, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], sizes[:count], vt[:count].mT
    if count == 1:
        return _leading_pair(matrix)
    if short <= _EXACT or count + _EXTRA >= short:
        return _of_gram(matrix, count)
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices):  # the same pairs every time, whatever was drawn before
        torch.manual_seed(0)
        u, sizes, v = torch.svd_lowrank(matrix, q=count + _EXTRA, niter=_ROUNDS)
    return u[:, :count], sizes[:count], v[:, :count]


def _leading_pair(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the leading singular triplet by Lanczos' iteration from the longest row: few, small operations.

    σ is never too large, and within a few per cent of the largest where that hardly stands out (noise).
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, sizes, u = _leading_pair(matrix.mT)
        return u, sizes, v
    basis = _unit(matrix[matrix.square().sum(1).argmax()])[:, None]  # (columns, 1)
    images: list[Tensor] = []
    for step in range(min(_KRYLOV, *matrix.shape)):
        images.append(matrix @ basis[:, step])  # (rows,)
        following = matrix.mT @ images[-1]  # (columns,)
        for _ in range(2):  # once leaves rounding errors of what it takes away
            following = following - basis @ (basis.mT @ following)
        basis = torch.cat([basis, _unit(following)[:, None]], 1)
    image = torch.stack(images, 1)  # (rows, steps)
    _, vectors = torch.linalg.eigh((image.mT @ image).cpu())
    inner = vectors[:, -1:].to(image)  # (steps, 1)
    left = image @ inner  # (rows, 1)
    return (
        left / left.norm().clamp(min=torch.finfo(left.dtype).tiny),
        left.norm()[None],
        basis[:, :-1] @ inner,
    )


def _unit(vector: Tensor) -> Tensor:
    size: Tensor = vector.norm()
    return vector / size.clamp(min=torch.finfo(vector.dtype).tiny)


def _of_gram(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds leading singular triplets from the eigenvectors of the shorter side's products, in float64."""
    if matrix.shape[0] > matrix.shape[1]:
        v, sizes, u = _of_gram(matrix.mT, count)
        return u, sizes, v
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.mT)  # ascending
    u = vectors[:, -count:].flip(1)  # (rows, count)
    v = wide.mT @ u  # (columns, count)
    sizes = v.norm(dim=0)
    v = v / sizes.clamp(min=torch.finfo(matrix.dtype).tiny)
    return u.to(matrix.dtype), sizes.to(matrix.dtype), v.to(matrix.dtype)
