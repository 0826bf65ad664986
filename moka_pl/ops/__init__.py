"""The mathematics of mixtures of Kronecker products, on plain tensors.

Letters of shapes and formulas, in every docstring and comment of this package:
    T           tokens: the product of the leading dimensions of x
    m, n        output and input features of a layer
    x           input, (..., n) or (T, n); where tokens lie in columns (n, T)
    r           components of a layer, numbered by i
    C           components of one shape, numbered by c
    A_i         left factor, (m_a, n_a), or an identity, which takes no room (MoKA_s)
    B_i         right factor, (m_b, n_b)
    w           weights of the components, (r,): w_i = s α_i
    s           scaling
    α           gates, (r,), made of the gate logits g, (r,)
    left        all left factors, packed one after another: (Σ m_a n_a,)
    right       all right factors likewise: (Σ m_b n_b,)
    W           weight of the frozen layer, (m, n)
    ΔW          Σ_i w_i (A_i ⊗ B_i), cut or zero-filled to (m, n)
    X, G, D     x of one token as an (n_a, n_b) matrix; ∂L/∂y likewise, (m_a, m_b); ∂L/∂ΔW, (m, n)
    a, b, p, q  indices below m_a, m_b, n_a, n_b: entry (a m_b + b, p n_b + q) of A ⊗ B is A[a, p] B[b, q]
"""
